"""Class names to class ids, and checks of class ids, before anything heavy is imported or computed.

`id2label` is the dictionary in a model's `model_index.json`: id -> names, with synonyms separated by commas.
"""

import difflib
import operator


def label_table(id2label: dict | None) -> dict[str, int]:
    """name -> id for every name and synonym, sorted by name. Source: upstream's `DiTPipeline.labels`."""
    table = {name.strip(): int(key) for key, names in (id2label or {}).items() for name in names.split(",")}
    return dict(sorted(table.items()))


def find_label_ids(names: str | list[str], labels: dict[str, int]) -> list[int]:
    """The class id of each name; one name may stand without a list. Case, spaces, `_` and `-` do not matter.

    Raises ValueError, in one line with the nearest names, for a name that is not in `labels`.
    """
    if not labels:
        raise ValueError("this model has no class names (no id2label in its model_index.json); give class ids instead")
    names = [names] if isinstance(names, str) else list(names)
    plain = {plain_form(name): label for name, label in labels.items()}
    names = [first_synonym(name, plain) for name in names]
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"class name {name!r} is not a string; the pipeline takes ids as they are")
        if name not in labels and plain_form(name) not in plain:
            raise ValueError(f"unknown class {name!r}; nearest: {', '.join(nearest_names(name, labels))}")
    return [labels[name] if name in labels else plain[plain_form(name)] for name in names]


def first_synonym(name: str, plain: dict[str, int]) -> str:
    """The first of several synonyms of one class, as `id2label` lists them ("T-shirt, top"); else the name itself."""
    parts = name.split(",") if isinstance(name, str) else [name]
    known = {plain.get(plain_form(part.strip())) for part in parts} if len(parts) > 1 else set()
    return parts[0].strip() if len(known) == 1 and None not in known else name


def nearest_names(name: str, labels: dict[str, int], count: int = 5) -> list[str]:
    """The `count` names that look most like `name`, best first."""
    spelling = {plain_form(known): known for known in labels}
    near = difflib.get_close_matches(plain_form(name), spelling, n=count, cutoff=0.0)
    return [spelling[form] for form in near]


def plain_form(name: str) -> str:
    """A name without case, spaces, underscores and hyphens."""
    return name.casefold().replace(" ", "").replace("_", "").replace("-", "")


def check_class_ids(class_labels, null_class: int) -> list[int]:
    """Class ids as a list of ints: from one id or many, Python's, NumPy's or a tensor's integers.

    `null_class`, "no class", is allowed. Raises ValueError or TypeError, naming the value, for anything else.
    """
    if hasattr(class_labels, "tolist"):  # a tensor or an array, without importing either library
        class_labels = class_labels.tolist()
    if isinstance(class_labels, str):
        raise TypeError(f"class_labels are ids, not names; use get_label_ids({class_labels!r})")
    if not isinstance(class_labels, (list, tuple, range)):
        class_labels = [class_labels]
    if len(class_labels) == 0:
        raise ValueError("no class_labels given; name at least one class id")
    return [check_class_id(value, null_class) for value in class_labels]


def check_class_id(value, null_class: int) -> int:
    """One class id as an int; errors as `check_class_ids`."""
    try:
        number = value.item() if hasattr(value, "item") else value
        label = None if isinstance(number, bool) else operator.index(number)
    except (TypeError, ValueError, RuntimeError):
        label = None
    if label is None:
        raise TypeError(f"class id {' '.join(repr(value).split())} is not an integer")
    if not 0 <= label <= null_class:
        raise ValueError(f"class id {label} is out of range: this model has 0 to {null_class - 1}, "
                         f"and {null_class} for no class")
    return label
