"""Results of an evaluation as people read them."""

from typing import Any

from pipeline.errors import printable


def table(results: dict[str, dict[str, Any]], method: str) -> str:
    """Results as lines of text, accuracies in percent."""
    first = next(iter(results.values()))
    if method == "segment":
        columns = {"mIoU %": "miou", "pixels %": "accuracy", "k-NN mIoU %": "knn_miou", "k-NN pix. %": "knn_accuracy"}
        columns |= {"untr. mIoU %": "untrained_miou", "untr. k-NN %": "untrained_knn_miou"}
    else:
        title = {"knn": f"{first.get('neighbours')}-NN", "linear": "linear"}[method]
        columns = {f"{title} %": "accuracy", "top-5 %": "top5", "untrained %": "untrained_accuracy"}
    columns = {head: key for head, key in columns.items() if key in first}
    width = max(len("model"), *(len(printable(name)) for name in results))
    lines = [f"{'model':<{width}}  {'M params':>9}  {'GFLOPs':>8}" + "".join(f"  {head:>12}" for head in columns)]
    for name, entry in results.items():
        cells = "".join(f"  {100 * entry[key]:>12.1f}" for key in columns.values())
        lines.append(f"{printable(name):<{width}}  {entry['params'] / 1e6:>9.2f}  {entry['gflops']:>8.3g}{cells}")
    if "pixels_accuracy" in first:
        lines.append(f"{'pixels':<{width}}  {'':>9}  {'':>8}  {100 * first['pixels_accuracy']:>12.1f}")
    lines.append(f"{first['train_images']} training and {first['val_images']} validation images{_skipped(first)}")
    return "\n".join(lines)


def _skipped(entry: dict[str, Any]) -> str:
    parts = [f"{count} {reason} in {name}" for name, by in entry["skipped"].items() for reason, count in by.items()]
    return f"; left out: {', '.join(parts)}" if parts else ""
