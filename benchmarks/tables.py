"""Draws the README's tables from `benchmarks/results/`, between its markers.

`python benchmarks/tables.py` rewrites README.md; with `--check` it exits with 1 where the README says anything else.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def load(name):
    return json.loads((RESULTS / name).read_text())


def markdown(columns, rows):
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def machine(record):
    info = record.get("machine", record)
    parts = [info.get("gpu") or info.get("cpu") or info.get("platform")]
    parts += [f"{info['cores']} cores"] if info.get("cores") and not info.get("gpu") else []
    parts += [f"torch {info['torch']}", info["date"]]
    return ", ".join(part for part in parts if part)


def decode():
    record = load("decode-2cores.json")
    rows = []
    for point in record["points"]:
        faster = point["speedup"]
        spread = f"{faster['min']:.1f} to {faster['max']:.1f}"
        rows.append([f"{point['cached_tokens']:,}", f"{faster['median']:.1f} x", spread])
    first, last = (record["points"][i]["cached_tokens"] for i in (0, -1))
    growth, size = record["our_step_longest_over_shortest"], record["cache_bytes_per_token"]
    return (
        f"One decode step, {machine(record)}, float32, 4 layers of hidden size 1024 and 16 heads, batch 1; "
        "`python benchmarks/decode.py`.\n\n"
        + markdown(["cached tokens", "faster than transformers 5.23", "range"], rows)
        + f"\n\nOur step at {last:,} cached tokens costs {growth:.1f} x that at {first:,}. The cache takes {size:,} "
        "bytes a token, as accounted."
    )


def train_step():
    record = load("train_step-2cores.json")
    names = {"ours": "ours, MTP and balance off (the same computation)"}
    names["with MTP and balance"] = "ours, with MTP and balance"
    rows = []
    for name, cost in record["cost_over_native"].items():
        rows.append([names[name], f"{cost['median']:.2f} x", f"{cost['min']:.2f} to {cost['max']:.2f}"])
    table = markdown(["one training step", "time over transformers 5.23", "range"], rows)
    return f"{machine(record)}, {record['tokens']:,} tokens; `python benchmarks/train_step.py`.\n\n{table}"


def mtp():
    record = load("mtp-demo.json")
    rows = []
    for point in record["points"]:
        speeds = [f"{point[name]['median']:.2f} x" for name in ("over_plain", "over_native")]
        own = f"{point['teacher_forced_on_own_text']:.1%} ({point['tokens_per_step_allowed_at_depth_1']:.2f})"
        rows.append([point["batch"], point["asked"], point["depth"], f"{point['tokens_per_step']:.2f}", own, *speeds])
    columns = ["batch", "`num_assistant_tokens`", "drafts a step", "tokens a step", "acceptance (tokens it allows)"]
    columns += ["over our plain decoding", "over transformers' plain decoding"]
    forced = record["teacher_forced_acceptance"][0]
    head = f"The demo's model, greedy, {machine(record)}; `python benchmarks/mtp.py`."
    head += f" Acceptance of depth 1 by teacher forcing: {forced:.1%} on held-out text; in the table on the text that "
    head += "the model wrote, with the tokens a step that one draft then allows."
    return f"{head}\n\n{markdown(columns, rows)}"


def convert():
    record, layer = load("convert-2cores.json"), load("convert-layer.json")
    names = {"bf16": "BF16", "fp8": "FP8", "ue8m0": "FP8 with ue8m0 scales", "fused": "transformers' fused layout"}
    names |= {"inference": "DeepSeek's inference shards", "from-inference": "FP8"}
    rows = []
    for row in record["rows"]:
        name = f"{names[row['source']]} to {names[row['case']]}"
        memory = f"{row['peak_rss_bytes'] / 1e6:.0f} MB"
        rows.append([name, f"{row['ratio']:.2f}", f"{row['ratio_lowest']:.2f}", memory])
    whole = layer["rows"][0]
    columns = ["conversion", "speed over `cp` of the written bytes", "lowest", "peak memory of both workers"]
    written, memory = whole["written_bytes"] / 1e9, whole["peak_rss_bytes"] / 1e6
    return (
        f"{machine(record)}, 2 workers, cold caches; `python benchmarks/convert.py`.\n\n{markdown(columns, rows)}\n\n"
        f"A layer of true size (256 experts, {written:.0f} GB written): {whole['ratio']:.2f} of `cp`, {memory:.0f} MB."
    )


def kernels():
    record = load("kernels-h200.json")
    rows = []
    for row in record["rows"]:
        peers = ", ".join(f"{name} {us:.0f} µs ({share:.2f} x)" for name, (us, share) in row["peers"].items())
        figures = [f"{row['us']:.1f}", f"{row['tflops']:.0f}", f"{row['gbs']:.0f}", f"{row['share']:.2f}"]
        rows.append([row["operation"], row["shape"], *figures, peers])
    columns = ["operation", "shape", "µs", "TFLOP/s", "GB/s", "share of the floor", "peers in the same run"]
    copy, bf16 = record["machine"]["copy"] / 1e12, record["machine"]["bf16"] / 1e12
    ceilings = f"measured ceilings: copy {copy:.2f} TB/s, BF16 {bf16:.0f} TFLOP/s"
    return f"{machine(record)}; {ceilings}; `python benchmarks/kernels.py`.\n\n{markdown(columns, rows)}"


def layer():
    record = load("layer-h200.json")
    rows = [
        [
            "prefill" if point.get("prefill") else "decode",
            point["batch"],
            f"{point['tokens']:,}",
            f"{point['native']:.1f}",
            f"{point['ours']:.1f}",
            f"{point['native'] / point['ours']:.1f} x",
            *_replayed(point),
        ]
        for point in record["points"]
    ]
    columns = ["what", "batch", "tokens", "transformers 5.23 ms", "ours ms", "faster", "replayed ms", "faster"]
    return (
        f"1 dense and 2 MoE layers and the head, BF16, {machine(record)}; `python benchmarks/layer.py`. Both launched "
        "kernel by kernel, and ours replayed from a CUDA graph, as `generate` decodes.\n\n"
        f"{markdown(columns, rows)}\n\nAt batch 1 a step that is not replayed is bound by the host's launches."
    )


def _replayed(point):
    if "replayed" not in point:
        return ["", ""]
    return [f"{point['replayed']:.1f}", f"{point['native'] / point['replayed']:.1f} x"]


def mtp_machinery():
    record = load("mtp_machinery-h200.json")
    rows = []
    for point in record["points"]:
        share = f"{point['speedup'] / point['tokens_per_step']:.0%}"
        new, steps = point["new_tokens"], f"{point['tokens_per_step']:.2f}"
        each = [f"{point[name] / new:.1f}" for name in ("plain", "mtp")]
        verified = point["tokens_per_step"] * point["forward_of_one_ms"] / point["forward_of_two_ms"]
        least = f"{point['speedup'] / verified:.0%}"
        rows.append([point["batch"], new, *each, steps, f"{point['speedup']:.2f} x", share, least])
    columns = [
        "batch",
        "new tokens",
        "plain ms a token",
        "with MTP",
        "tokens a step",
        "over our plain decoding",
        "of what free drafts would give",
        "of it with the verification's own cost",
    ]
    return (
        "Moonlight-16B-A3B's sizes with one MTP module, random BF16 weights, drafts accepted with probability "
        f"{record['rate']} by construction, CUDA graphs, whole calls after a prompt "
        f"of 128, {machine(record)}; `python benchmarks/mtp_machinery.py`.\n\n{markdown(columns, rows)}"
    )


def train():
    record = load("train-h200.json")
    rows = []
    for point in record["points"]:
        ms, faster = point["ms"], point["faster_than"]
        rows.append(
            [
                point["layer"],
                f"{point['tokens']:,}",
                f"{ms['native']:.1f}",
                f"{ms['bf16']:.1f}",
                f"{ms['fp8']:.1f}",
                f"{faster['bf16']:.2f} x",
                f"{faster['native']:.2f} x",
                f"{point['floor_ms']['fp8'] / ms['fp8']:.0%}",
                f"{point['activations_over_bf16']:.2f}",
                f"{ms['fp8_quantising_weights'] - ms['fp8']:.1f}",
            ]
        )
    columns = ["layer", "tokens", "transformers 5.23 ms", "ours BF16", "ours FP8", "over BF16", "over transformers"]
    columns += ["of the floor", "activations over BF16", "weights to FP8, ms a step"]
    return (
        f"Forward and backward of one layer of DeepSeek-V3's true size, {machine(record)}; `python "
        "benchmarks/train.py`. A micro-batch: the weights' codes are made once an optimizer step, which the last "
        "column adds.\n\n" + markdown(columns, rows)
    )


def qlora():
    record = load("qlora-h200.json")
    parameters = record["parameters"]
    gb = {name: f"{record[name] / 1e9:.1f} GB" for name in record if "bytes" in name}
    rows = [
        ["weights in memory", gb["resident_weight_bytes"]],
        ["of them the routed experts", gb["expert_bytes"]],
        ["peak while loading", gb["peak_bytes_loading"]],
        ["peak while training", gb["peak_bytes_training"]],
        ["tokens a second", f"{record['tokens_per_second']:,.0f}"],
    ]
    if longer := record.get("longer"):
        rows.append([f"peak with {longer['length']:,} tokens a step", f"{longer['peak_bytes_training'] / 1e9:.1f} GB"])
        rows.append(["tokens a second then", f"{longer['tokens_per_second']:,.0f}"])
    head = f"Moonlight-16B-A3B's sizes ({parameters / 1e9:.1f} billion parameters, random), NF4 with double "
    head += f"quantisation, LoRA of rank {record['rank']} on {record.get('targets', 'attention and experts')}, "
    head += f"{record['length']:,} tokens a step, activation checkpointing, {machine(record)}; "
    head += "`python benchmarks/qlora.py`."
    return f"{head}\n\n{markdown(['QLoRA on one GPU', ''], rows)}"


def loss_memory():
    record = load("loss_memory-cpu.json")
    peak, logits = record["peak_mb"], record["logits_mb"]
    rows = [
        ["plain: two full logits, float32 cross-entropy", f"{peak['plain']:,.0f} MB", f"{peak['plain'] / logits:.1f}"],
        ["ours", f"{peak['ours']:,.0f} MB", f"{peak['ours'] / logits:.1f}"],
    ]
    size = f"{record['rows']:,} tokens, {record['vocabulary']:,} words, BF16"
    table = markdown(["main and MTP loss, forward and backward", "peak memory", "in BF16 logits"], rows)
    return f"{size}, {machine(record)}; `python benchmarks/loss_memory.py`.\n\n{table}"


TABLES = {
    "mtp_machinery": mtp_machinery,
    "train": train,
    "qlora": qlora,
    "loss_memory": loss_memory,
    "layer": layer,
    "decode": decode,
    "train_step": train_step,
    "mtp": mtp,
    "convert": convert,
    "kernels": kernels,
}


def drawn(text):
    """`text` with every table between `<!-- table:NAME -->` and `<!-- end -->` drawn anew."""
    for name, draw in TABLES.items():
        start, end = f"<!-- table:{name} -->", "<!-- end -->"
        if start in text:
            before, rest = text.split(start, 1)
            text = f"{before}{start}\n{draw()}\n{end}{rest.split(end, 1)[1]}"
    return text


def main():
    pages = [ROOT / "README.md", ROOT / "benchmarks" / "README.md"]
    stale = [page for page in pages if page.read_text() != drawn(page.read_text())]
    if "--check" in sys.argv:
        sys.exit(f"drawn from other results: {', '.join(map(str, stale))}" if stale else 0)
    for page in stale:
        page.write_text(drawn(page.read_text()))


if __name__ == "__main__":
    main()
