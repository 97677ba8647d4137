"""Format numbers for people."""

METHODS = {"full": "Full fine-tuning", "lora": "LoRA", "qlora": "QLoRA", "promptTuning": "Prompt tuning"}
ABSENT = "—"


def size(count: float | None) -> str:
    """Format bytes: 1.2 GB (decimal units, as for disks and object stores)."""
    if count is None:
        return ABSENT
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def duration(seconds: float | None) -> str:
    """Format seconds: 1 h 5 min, 3 min 20 s, 4.2 s, 12 ms."""
    if seconds is None:
        return ABSENT
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 99.5:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def share(value: float | None, digits: int = 3) -> str:
    """Format a share from 0 to 1 in percent, with `digits` significant digits."""
    return ABSENT if value is None else f"{100 * value:.{digits}g} %"


def count(value: float | None) -> str:
    return ABSENT if value is None else f"{value:,.0f}"


def number(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}×"


def method(name: str) -> str:
    return METHODS.get(name, name)


def setting(value: object) -> str:
    """Format a hyperparameter as in YAML."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)
