"""Numbers as people read them."""

import math


def quantity(metric: str) -> str:
    """The last word of a metric's name: "accuracy" of "test/accuracy", "validation_accuracy" or "accuracy"."""
    return metric.replace("_", "/").replace(".", "/").replace(" ", "/").rpartition("/")[2]


def is_share(metric: str) -> bool:
    """Whether a metric is a share of 1, shown in percent."""
    return quantity(metric) in ("accuracy", "recall", "precision", "f1", "auc")


def metric_text(metric: str, value: float) -> str:
    """The value of a metric: "87.3%" for an accuracy, four significant digits for anything else."""
    if not math.isfinite(value):
        return str(value)
    return f"{100 * value:.1f}%" if is_share(metric) else number_text(value)


def number_text(value: float) -> str:
    """Four significant digits, with separators from a thousand: "0.4123", "12.34", "12,345"."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}" if abs(value) < 1e12 else f"{value:.3e}"
    if abs(value) < 1e-3:
        return f"{value:.3e}"
    decimals = max(0, 3 - math.floor(math.log10(abs(value))))
    return f"{value:.{decimals}f}" if value != int(value) else f"{value:.0f}"


def bytes_text(count: float) -> str:
    """Three significant digits and a decimal unit: "0 B", "12.3 KB", "1.72 MB"."""
    scaled, unit = float(count), "B"
    for larger in ("KB", "MB", "GB", "TB", "PB"):
        if abs(scaled) < 999.5:
            break
        scaled, unit = scaled / 1000, larger
    if unit == "B":
        return f"{scaled:.0f} B"
    return f"{scaled:.{0 if abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2}f} {unit}"


def seconds_text(seconds: float) -> str:
    """A duration: "34 ms", "1.2 s", "45 s", "3 min 20 s", "2 h 05 min"."""
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plural(count: int, word: str) -> str:
    """ "1 site", "3 sites"."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"
