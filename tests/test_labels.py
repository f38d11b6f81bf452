"""nets/labels.py: the table against upstream's `DiTPipeline`, and what is and is not taken as a class."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from nets.labels import check_class_ids, find_label_ids, label_table, nearest_names, plain_form

IMAGENET = json.loads((Path(__file__).parents[1] / "model_data" / "imagenet_id2label.json").read_text())
SMALL = {"0": "tench, Tinca tinca", "1": "white shark", "2": "polar-bear , ice bear", "3": "Cardigan", "4": "cardigan"}


def upstream(id2label):
    return DiTPipeline(transformer=None, vae=None, scheduler=None, id2label=id2label)


@pytest.mark.parametrize("id2label", [IMAGENET, SMALL, {7: " a ,b", 3: "b"}, {}, None],
                         ids=["imagenet", "small", "int keys, one name twice", "empty", "none"])
def test_the_table_equals_upstreams_in_its_order(id2label):
    assert list(label_table(id2label).items()) == list(upstream(id2label).labels.items())


def test_every_imagenet_name_has_upstreams_id():
    names = list(label_table(IMAGENET))
    assert find_label_ids(names, label_table(IMAGENET)) == upstream(IMAGENET).get_label_ids(names)


@pytest.mark.parametrize("name, label", [("white shark", 1), ("WHITE SHARK", 1), ("white_shark", 1), ("White-Shark", 1),
                                         ("whiteshark", 1), (" tench ", 0), ("Polar Bear", 2), ("tinca_tinca", 0)])
def test_case_spaces_underscores_and_hyphens_do_not_matter(name, label):
    assert find_label_ids([name], label_table(SMALL)) == [label]


def test_a_name_spelled_exactly_wins_over_one_that_differs_in_case():
    assert find_label_ids(["Cardigan", "cardigan"], label_table(SMALL)) == [3, 4]


def test_one_name_alone_is_one_name_and_not_its_letters():
    assert find_label_ids("tench", label_table(SMALL) | dict.fromkeys("tench", 9)) == [0]


def test_names_keep_their_order_and_repeats():
    assert find_label_ids(("white shark", "tench", "white shark"), label_table(SMALL)) == [1, 0, 1]


@settings(database=None, deadline=None)
@given(st.text(st.characters(max_codepoint=0x24F)))
def test_the_plain_form_ignores_what_is_put_between_the_letters(text):
    assert plain_form("_".join(text)) == plain_form(" ".join(text.casefold())) == plain_form("-" + text + " ")


@pytest.mark.parametrize("name, meant", [("white shrak", "white shark"), ("Tenchh", "tench"),
                                         ("iced bear", "ice bear")])
def test_an_unknown_name_is_refused_in_one_line_that_names_the_nearest(name, meant):
    with pytest.raises(ValueError, match=f"^unknown class '{name}'; nearest: {meant}, ") as error:
        find_label_ids(["tench", name], label_table(SMALL))
    assert "\n" not in str(error.value)


def test_the_nearest_names_are_real_names_best_first_and_no_more_than_asked():
    labels = label_table(IMAGENET)
    near = nearest_names("golden_retreiver", labels, count=3)
    assert near[0] == "golden retriever"
    assert len(set(near)) == 3 and set(near) <= set(labels)


def test_an_unknown_name_of_several_lines_is_refused_in_one_line():
    with pytest.raises(ValueError) as error:
        find_label_ids("white\nshrak", label_table(SMALL))
    assert "\n" not in str(error.value) and "nearest: white shark" in str(error.value)


@pytest.mark.parametrize("names", ["tench", ["tench"], []])
def test_names_for_a_model_without_names_are_refused_in_one_line(names):
    with pytest.raises(ValueError, match=r"no class names.*class ids instead$"):
        find_label_ids(names, label_table(None))


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
