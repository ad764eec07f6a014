"""Peak memory of the main and the MTP loss over a large vocabulary, forward and backward, against the plain form (two
full-size logits, torch's cross-entropy in float32). Each form runs in a process of its own, on the CPU in BF16.
"""

import resource
import subprocess
import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from benchmarks.common import finish, parser

ROWS, WIDTH, VOCABULARY = 2048, 512, 65536


def run(form):
    """Megabytes above what the inputs take, and the loss."""
    from deepseek_v3.modeling_deepseek_v3.losses import cross_entropy_sum, head_cross_entropy_sum

    torch.manual_seed(0)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False, dtype=torch.bfloat16)
    main, mtp = (torch.randn(ROWS, WIDTH, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
    labels = torch.randint(0, VOCABULARY, (ROWS,))
    head(main[:8]).sum().backward()  # what is allocated once
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if form == "plain":
        losses = [torch.nn.functional.cross_entropy(head(x).float(), labels, reduction="sum") for x in (main, mtp)]
    else:
        losses = [cross_entropy_sum(head(main), labels), head_cross_entropy_sum(head, mtp, labels, VOCABULARY)]
    loss = losses[0] + 0.3 * losses[1]
    loss.backward()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, loss.item() / ROWS)


def main():
    args = parser(__doc__)
    args.add_argument("--form", choices=["plain", "ours"])
    options = args.parse_args()
    if options.form:
        run(options.form)
        return
    figures = {}
    for form in ("plain", "ours"):
        done = subprocess.run([sys.executable, __file__, "--form", form], capture_output=True, text=True, check=True)
        figures[form] = [float(value) for value in done.stdout.split()]
    if abs(figures["ours"][1] - figures["plain"][1]) > 1e-2 * figures["plain"][1]:
        sys.exit(f"the losses differ: {figures}; nothing is reported")
    share = figures["ours"][0] / figures["plain"][0]
    logits = ROWS * VOCABULARY * 2 / 2**20
    rows = [[form, megabytes, megabytes / logits] for form, (megabytes, _) in figures.items()]
    data = {
        "rows": ROWS,
        "vocabulary": VOCABULARY,
        "logits_mb": logits,
        "peak_mb": {f: v[0] for f, v in figures.items()},
    }
    finish("loss_memory", ["form", "peak MB", "in BF16 logits"], rows, {**data, "share": share}, options.output)


if __name__ == "__main__":
    main()
