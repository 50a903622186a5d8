"""The same model by Unsloth: its random weights are saved without Unsloth, then loaded through Unsloth's own calls.

    python bench/unsloth_mode.py llama-8b-lora cuda 0 FOLDER     # saves; `build` starts it

Unsloth patches transformers when it is imported, so that the weights are made in a process that never imports it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import works
from torch import nn

# Nothing is to be fetched or reported; "1" also is what Unsloth's own look at the environment takes.
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def build(task: dict, notes: dict, folder: Path) -> nn.Module:
    """The work's model, ready to train. Unsloth writes what it generates under `folder`."""
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    weights = folder / "weights"
    command = [sys.executable, __file__, task["work"], task["device"], str(task["seed"]), str(weights)]
    subprocess.run(command, check=True)
    os.environ["UNSLOTH_COMPILE_LOCATION"] = str(folder / "unsloth_compiled_cache")
    os.chdir(folder)

    from unsloth import FastLanguageModel

    shape, method = works.parse(task["work"])
    checkpointing = task["checkpointing"]
    if checkpointing:
        notes["checkpointing"] = "Unsloth's use_gradient_checkpointing=True"
    model, _ = FastLanguageModel.from_pretrained(
        str(weights),
        max_seq_length=shape.length,
        dtype=shape.dtype,
        load_in_4bit=method == "qlora",
        full_finetuning=method == "full",
        use_gradient_checkpointing=checkpointing,
        offload_embedding=False,
        random_state=task["seed"],
        local_files_only=True,
    )
    shutil.rmtree(weights)
    if method != "full":
        model = FastLanguageModel.get_peft_model(
            model,
            r=works.RANK,
            lora_alpha=works.ALPHA,
            lora_dropout=0,
            bias="none",
            target_modules=TARGETS,
            use_gradient_checkpointing=checkpointing,
            random_state=task["seed"],
        )
        # Unsloth makes float32 adapters; those of all other modes have the weights' dtype.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(shape.dtype)
    FastLanguageModel.for_training(model, use_gradient_checkpointing=checkpointing)
    return model


def save(work: str, device: str, seed: int, folder: Path) -> None:
    """Configuration, weights and a tokenizer that only looks like one: Unsloth loads no model without."""
    works.base(work, device, seed).save_pretrained(folder)
    tokenizer(works.parse(work)[0]).save_pretrained(folder)


def tokenizer(shape: works.Shape):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = {word: i for i, word in enumerate([*special.values(), "a", "b"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=shape.length, **special)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    save(sys.argv[1], sys.argv[2], int(sys.argv[3]), Path(sys.argv[4]))
