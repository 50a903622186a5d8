"""Peak memory of what users do with a model's logits, with and without rewriter, on one GPU.

    python bench/logits.py        # JSON to $OUT, default bench/results

A Qwen2 of two narrow blocks with 151,936 classes, 4 x 2048 tokens, bf16: a step with the accuracy by argmax, a step
with a cross entropy of one's own on outputs.logits, and an evaluation that reads log-probabilities.
"""

import copy
import json
import os
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

import rewriter

OUT = Path(os.environ.get("OUT", Path(__file__).parent / "results"))


def accuracy(model, ids):
    outputs = model(input_ids=ids, labels=ids)
    right = (outputs.logits.argmax(-1)[:, :-1] == ids[:, 1:]).float().mean()
    outputs.loss.backward()
    return {"loss": outputs.loss.item(), "accuracy": right.item()}


def own_loss(model, ids):
    outputs = model(input_ids=ids, labels=ids)
    loss = F.cross_entropy(outputs.logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return {"loss": loss.item(), "gradient of the head": model.lm_head.weight.grad.double().norm().item()}


def evaluation(model, ids):
    with torch.no_grad():
        outputs = model(input_ids=ids, labels=ids)
        logs = outputs.logits.float().log_softmax(-1).gather(-1, ids[..., None])
    return {"loss": outputs.loss.item(), "mean log-probability": logs.mean().item()}


def peak_mib(work, model, ids):
    """(results, peak beyond what was there) of the second run."""
    for _ in range(2):
        model.zero_grad()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = work(model, ids)
        torch.cuda.synchronize()
    return results, (torch.cuda.max_memory_allocated() - before) / 2**20


def main():
    config = transformers.Qwen2Config(
        hidden_size=896, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=14, num_key_value_heads=2,
        vocab_size=151936,
    )  # fmt: skip
    eager = transformers.AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16).train()
    model = rewriter.optimize(copy.deepcopy(eager))
    ids = torch.randint(3, 151000, (4, 2048), device="cuda")
    rows = []
    for work in (accuracy, own_loss, evaluation):
        for name, given in (("eager", eager), ("rewriter", model)):
            results, peak = peak_mib(work, given, ids)
            rows.append({"work": work.__name__, "mode": name, "peak MiB": round(peak), **results})
            print(rows[-1], flush=True)
    environment = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    environment["transformers"] = transformers.__version__
    (OUT / "logits.json").write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
