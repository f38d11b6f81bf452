"""Class names to class ids, and checks of class ids, before anything heavy is imported or computed.

`id2label` is the dictionary in a model's `model_index.json`: id -> names, with synonyms separated by commas.
"""

import difflib
import operator


def label_table(id2label: dict | None) -> dict[str, int]:
    """name -> id for every name and synonym, sorted by name; of classes with one name it holds the last.

    For programs that read upstream's `DiTPipeline.labels`; `find_label_ids` refuses such names instead.
    """
    table = {name.strip(): int(key) for key, names in (id2label or {}).items() for name in names.split(",")}
    return dict(sorted(table.items()))


def find_label_ids(names: str | list[str], id2label: dict | None) -> list[int]:
    """The class id of each name; one name may stand without a list.

    Case, spaces, `_` and `-` do not matter. `207` and `#207` are ids as they stand (whether the model has that class is for
    `check_class_ids`), `crane#134` is the class 134, which must be called crane, and `maillot, tank suit` the class that
    has both names.
    Raises ValueError, in one line, for a name that no class has, with the nearest names, and for a name that several
    classes have, with a spelling for each of them.
    """
    names = [names] if isinstance(names, str) else list(names)
    index = name_index(id2label)
    return [find_label_id(name, index) for name in names]


def find_label_id(name: str, index: dict[str, dict[int, str]]) -> int:
    """One name's class id, see `find_label_ids`; `index` is from `name_index`."""
    if not isinstance(name, str):
        raise ValueError(f"class name {name!r} is not a string; the pipeline takes ids as they are")
    meant = classes_meant(name, index)
    if len(meant) == 1:
        return meant.pop()
    if meant:
        ways = [repr(way) for label in sorted(meant) for way in ways_to_say(name, label, index)]
        raise ValueError(f"{name!r} stands for {len(meant)} classes; say {' or '.join(ways)}")
    called, label = split_id(name)
    if label is not None:
        raise ValueError(f"{name!r}: class {label} is not called {called!r}")
    if not index:
        raise ValueError(f"{name!r} is a name, but this model has no class names (no id2label in its model_index.json); "
                         "give class ids instead")
    raise ValueError(f"unknown class {name!r}; nearest: {', '.join(nearest_names(name, index))}")


def name_index(id2label: dict | None) -> dict[str, dict[int, str]]:
    """plain form of a name -> {id: the name as it is written there}, for every name and synonym."""
    index = {}
    for key, names in (id2label or {}).items():
        for name in split_names(names):
            index.setdefault(plain_form(name), {}).setdefault(int(key), name)
    return index


def split_names(names: str) -> list[str]:
    """The names of one entry of `id2label`."""
    return [name.strip() for name in names.split(",") if name.strip()]


def split_id(name: str) -> tuple[str, int | None]:
    """`crane#134` -> ("crane", 134); what has no id behind it -> (itself, None)."""
    called, mark, number = name.rpartition("#")
    return (called.strip(), int(number)) if mark and number.strip().isdecimal() else (name, None)


def classes_meant(name: str, index: dict[str, dict[int, str]]) -> set[int]:
    """The ids of all classes that a name may mean: by name, as a number, or as a name with its id."""
    called, label = split_id(name)
    if label is not None and not called:
        return {label}
    meant = classes_called(name, index)
    if name.strip().isdecimal():
        meant.add(int(name))
    if label in classes_called(called, index):
        meant.add(label)
    return meant


def classes_called(names: str, index: dict[str, dict[int, str]]) -> set[int]:
    """The ids of the classes that have a name, or all of several names with commas between."""
    having = [set(index.get(plain_form(name), ())) for name in split_names(names)]
    return set.intersection(*having) if having else set()


def spelling(name: str, label: int, index: dict[str, dict[int, str]]) -> str:
    """The shortest way to say a class by one of its names that means it alone: `goldfish`, `crane#134`, `#134`."""
    return next(way for way in (name, f"{name}#{label}", f"#{label}") if classes_meant(way, index) == {label})


def ways_to_say(name: str, label: int, index: dict[str, dict[int, str]]) -> list[str]:
    """Spellings that mean the class `label` alone: of this name, and of a synonym that no other class has, if there is."""
    synonyms = (ids[label] for ids in index.values() if label in ids)
    return [spelling(name.strip(), label, index),
            *(synonym for synonym in synonyms if classes_meant(synonym, index) == {label})][:2]


def spellings(id2label: dict | None) -> dict[int, list[str]]:
    """id -> for each name of the class the spelling that means it alone: `crane#134` where others have that name too."""
    index = name_index(id2label)
    return {int(key): [spelling(name, int(key), index) for name in split_names(names)]
            for key, names in (id2label or {}).items()}


def nearest_names(name: str, index: dict[str, dict[int, str]], count: int = 5) -> list[str]:
    """The `count` names that look most like `name`, best first."""
    near = difflib.get_close_matches(plain_form(name), index, n=count, cutoff=0.0)
    return [next(iter(index[form].values())) for form in near]


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
