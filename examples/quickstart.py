"""Ten lines of the API: an urgent prompt overtakes a long one. No download: random weights, real shape."""

import time

import torch

import fpcompile
from fpcompile.models.demo_models import build_demo_model

model = build_demo_model("qwen3-110m")  # or AutoModelForCausalLM.from_pretrained(...).eval()
program = fpcompile.segment(model)  # called like the model, which is left as it was
long, short = (torch.randint(1000, 9000, (1, n)) for n in (2048, 64))

with fpcompile.Engine(program, policy="s-edf") as engine:
    report = engine.submit(long, ttft_slo=60.0, logits_to_keep=1)
    time.sleep(0.5)  # the long one runs by now
    urgent = engine.submit(short, ttft_slo=2.0, logits_to_keep=1)  # stops it at its next cut
    print("urgent token", int(urgent.result().logits[0, -1].argmax()), f"after {urgent.metrics.ttft:.2f} s")
    print("long token", int(report.result().logits[0, -1].argmax()), f"after {report.metrics.ttft:.2f} s")
    print("preemptions of the long one:", report.metrics.preemptions)
