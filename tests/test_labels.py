"""nets/labels.py: the table against upstream's `DiTPipeline`, and what is and is not taken as a class."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from nets.labels import check_class_ids, find_label_ids, label_table, name_index, nearest_names, plain_form, spellings

IMAGENET = json.loads((Path(__file__).parents[1] / "model_data" / "imagenet_id2label.json").read_text())
SMALL = {"0": "tench, Tinca tinca", "1": "white shark", "2": "polar-bear , ice bear", "3": "Cardigan", "4": "cardigan"}


def upstream(id2label):
    return DiTPipeline(transformer=None, vae=None, scheduler=None, id2label=id2label)


@pytest.mark.parametrize("id2label", [IMAGENET, SMALL, {7: " a ,b", 3: "b"}, {}, None],
                         ids=["imagenet", "small", "int keys, one name twice", "empty", "none"])
def test_the_table_equals_upstreams_in_its_order(id2label):
    assert list(label_table(id2label).items()) == list(upstream(id2label).labels.items())


# The names that several classes of ImageNet have, once case, spaces, underscores and hyphens are ignored.
SHARED = {"crane": [134, 517], "maillot": [638, 639], "sand viper": [54, 66], "grass snake": [55, 57],
          "partridge": [82, 86], "crayfish": [123, 124], "crawfish": [123, 124], "catamount": [286, 287],
          "panther": [286, 290], "Sus scrofa": [341, 342], "polecat": [358, 361], "panda": [387, 388], "tub": [435, 876],
          "wagon": [436, 734], "gong": [494, 577], "horn": [513, 566], "harp": [593, 594], "missile": [657, 744],
          "Cardigan": [264, 474]}


def test_every_imagenet_name_of_one_class_has_upstreams_id():
    shared = {plain_form(name) for name in SHARED}
    names = [name for name in label_table(IMAGENET) if plain_form(name) not in shared]
    assert find_label_ids(names, IMAGENET) == upstream(IMAGENET).get_label_ids(names)
    assert len(label_table(IMAGENET)) - len(names) == len(SHARED) + 1  # cardigan and Cardigan


@pytest.mark.parametrize("name", SHARED)
def test_an_imagenet_name_of_several_classes_is_refused_with_a_spelling_for_each(name):
    with pytest.raises(ValueError, match=rf"^'{name}' stands for 2 classes; say ") as error:
        find_label_ids(name, IMAGENET)
    assert "\n" not in str(error.value)
    said = re.findall(r"'([^']+)'", str(error.value).partition("say ")[2])
    assert sorted(set(find_label_ids(said, IMAGENET))) == SHARED[name]


def test_the_refusal_names_a_synonym_that_is_unique_where_there_is_one():
    message = r"^'maillot' stands for 2 classes; say 'maillot#638' or 'maillot#639' or 'tank suit'$"
    with pytest.raises(ValueError, match=message):
        find_label_ids("maillot", IMAGENET)


def test_every_class_of_imagenet_is_reachable_by_a_spelling_with_its_name_in_it():
    table = spellings(IMAGENET)
    for label, names in IMAGENET.items():
        said = table[int(label)]
        assert [spelling.partition("#")[0] for spelling in said] == [name.strip() for name in names.split(",")]
        assert find_label_ids(said, IMAGENET) == [int(label)] * len(said)


def test_a_name_with_an_id_picks_the_class_and_must_be_its_name():
    assert find_label_ids(["crane#134", "Crane #517", "tank_suit#639"], IMAGENET) == [134, 517, 639]
    with pytest.raises(ValueError, match=r"^'crane#135': class 135 is not called 'crane'$"):
        find_label_ids("crane#135", IMAGENET)


def test_several_names_of_one_class_narrow_it_down():
    assert find_label_ids(["maillot, tank suit", IMAGENET["387"], "maillot,"], IMAGENET | {"638": "x"}) == [639, 387, 639]


@pytest.mark.parametrize("id2label", [IMAGENET, None], ids=["with names", "without names"])
def test_numbers_are_ids(id2label):
    assert find_label_ids(["207", "#207", " 7 ", "#1000"], id2label) == [207, 207, 7, 1000]


def test_a_number_that_is_the_name_of_another_class_is_refused_with_both():
    id2label = {0: "0", 1: "2", 2: "two"}
    assert find_label_ids(["0", "2#1", "#2"], id2label) == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^'2' stands for 2 classes; say '2#1' or '#2' or 'two'$"):
        find_label_ids("2", id2label)


def test_a_name_may_contain_the_mark():
    assert find_label_ids(["C#", "track #5"], {0: "C#", 1: "track #5"}) == [0, 1]


@pytest.mark.parametrize("id2label", [{0: "track #5", 1: "track", 5: "track"}, {0: "#5", 5: "five"}, {0: "a", 1: "a#0"},
                                      {0: "1", 1: "0"}, {0: "a, a", 1: "A"}], ids=str)
def test_every_spelling_that_is_offered_means_that_class(id2label):
    for label, said in spellings(id2label).items():
        assert find_label_ids(said, id2label) == [label] * len(said)
    for name in [name for names in id2label.values() for name in names.split(",")]:
        try:
            find_label_ids(name, id2label)
        except ValueError as error:
            offered = re.findall(r"'([^']+)'", str(error).partition("say ")[2])
            assert len(set(find_label_ids(offered, id2label))) == 2


@pytest.mark.parametrize("name, label", [("white shark", 1), ("WHITE SHARK", 1), ("white_shark", 1), ("White-Shark", 1),
                                         ("whiteshark", 1), (" tench ", 0), ("Polar Bear", 2), ("tinca_tinca", 0)])
def test_case_spaces_underscores_and_hyphens_do_not_matter(name, label):
    assert find_label_ids([name], SMALL) == [label]


def test_one_name_alone_is_one_name_and_not_its_letters():
    assert find_label_ids("goldfish", IMAGENET) == [1]
    assert find_label_ids("tench", {0: "tench", **dict(enumerate("tench", start=1))}) == [0]


def test_names_keep_their_order_and_repeats():
    assert find_label_ids(("white shark", "tench", "white shark"), SMALL) == [1, 0, 1]


@settings(database=None, deadline=None)
@given(st.text(st.characters(max_codepoint=0x24F)))
def test_the_plain_form_ignores_what_is_put_between_the_letters(text):
    assert plain_form("_".join(text)) == plain_form(" ".join(text.casefold())) == plain_form("-" + text + " ")


@pytest.mark.parametrize("name, meant", [("white shrak", "white shark"), ("Tenchh", "tench"),
                                         ("iced bear", "ice bear")])
def test_an_unknown_name_is_refused_in_one_line_that_names_the_nearest(name, meant):
    with pytest.raises(ValueError, match=f"^unknown class '{name}'; nearest: {meant}, ") as error:
        find_label_ids(["tench", name], SMALL)
    assert "\n" not in str(error.value)


def test_the_nearest_names_are_real_names_best_first_and_no_more_than_asked():
    near = nearest_names("golden_retreiver", name_index(IMAGENET), count=3)
    assert near[0] == "golden retriever"
    assert len(set(near)) == 3 and set(near) <= set(label_table(IMAGENET))


def test_an_unknown_name_of_several_lines_is_refused_in_one_line():
    with pytest.raises(ValueError) as error:
        find_label_ids("white\nshrak", SMALL)
    assert "\n" not in str(error.value) and "nearest: white shark" in str(error.value)


@pytest.mark.parametrize("names", ["tench", ["7", "tench"]])
def test_names_for_a_model_without_names_are_refused_in_one_line(names):
    with pytest.raises(ValueError, match=r"^'tench' is a name, .*no class names.*class ids instead$"):
        find_label_ids(names, None)


@pytest.mark.parametrize("class_labels", [
    [3, 0, 10], (3, 0, 10), np.array([3, 0, 10]), np.array([3, 0, 10], dtype=np.uint8), torch.tensor([3, 0, 10]),
    torch.tensor([3, 0, 10], dtype=torch.int32), [np.int64(3), np.uint8(0), 10], [torch.tensor(3), 0, torch.tensor(10)],
], ids=repr)
def test_integers_of_any_library_become_a_list_of_ints(class_labels):
    ids = check_class_ids(class_labels, null_class=10)
    assert ids == [3, 0, 10]
    assert {type(label) for label in ids} == {int}


@pytest.mark.parametrize("class_label", [7, np.int32(7), np.array(7), torch.tensor(7)], ids=repr)
def test_one_id_needs_no_list(class_label):
    assert check_class_ids(class_label, null_class=10) == [7]


def test_a_range_of_ids_is_taken():
    assert check_class_ids(range(11), null_class=10) == list(range(11))


@settings(database=None, deadline=None)
@given(st.integers(), st.integers(1, 2000))
def test_an_id_is_taken_exactly_if_it_is_from_zero_to_the_null_class(label, null_class):
    if label in range(null_class + 1):
        assert check_class_ids([label], null_class) == [label]
    else:
        allowed = f"0 to {null_class - 1}, and {null_class} for no class$"
        with pytest.raises(ValueError, match=f"^class id {label} is out of range: .* {allowed}"):
            check_class_ids([label], null_class)


@pytest.mark.parametrize("outside", [-1, 11, 10**30, np.int64(-1), np.uint8(255), torch.tensor(11)], ids=repr)
def test_an_id_outside_is_refused_wherever_it_stands(outside):
    for class_labels in (outside, [outside], [0, outside]):
        with pytest.raises(ValueError, match=f"^class id {int(outside)} is out of range"):
            check_class_ids(class_labels, null_class=10)


@pytest.mark.parametrize("wrong", [
    3.0, float("nan"), True, False, None, "3", b"3", 1j, np.float32(3), np.bool_(True), torch.tensor(3.0),
    torch.tensor(True), [3], np.array([3, 4]), torch.tensor([[3, 4]]),
], ids=repr)
def test_what_is_no_integer_is_refused_in_one_line(wrong):
    with pytest.raises(TypeError, match=r"^class id .* is not an integer$") as error:
        check_class_ids([0, wrong], null_class=10)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [
    3.0, True, None, {3}, {3: 4}, np.array([3.0]), np.array([True]), torch.tensor([3.0]), torch.tensor([True]),
    torch.tensor([[3, 4]]), np.float64(3), np.array(["3"]),
], ids=repr)
def test_a_container_of_something_else_is_refused(wrong):
    with pytest.raises(TypeError, match=r"^class id .* is not an integer$"):
        check_class_ids(wrong, null_class=10)


def test_an_array_of_rows_inside_a_list_is_refused_in_one_line():
    for rows in (torch.zeros(2, 2, dtype=torch.int64), np.zeros((2, 2), dtype=np.int64)):
        with pytest.raises(TypeError, match=r"is not an integer$") as error:
            check_class_ids([rows], null_class=10)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["tench", ""])
def test_a_name_in_place_of_ids_is_refused_with_what_to_call(name):
    with pytest.raises(TypeError, match=f"get_label_ids\\('{name}'\\)$"):
        check_class_ids(name, null_class=10)


@pytest.mark.parametrize("empty", [[], (), range(0), np.array([], dtype=np.int64), torch.tensor([])], ids=repr)
def test_no_ids_at_all_are_refused(empty):
    with pytest.raises(ValueError, match=r"^no class_labels given"):
        check_class_ids(empty, null_class=10)
