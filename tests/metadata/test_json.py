"""JSON text, paths into it, conversions and differences."""

from __future__ import annotations

import copy
import json
import math
import random
import string

import pytest

from comfyui_tpu.metadata import convert
from comfyui_tpu.metadata.diff import ADDED, CHANGED, MAX_CHANGES, REMOVED, REORDERED, Change, compare, describe
from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.extract import extract
from comfyui_tpu.metadata.jsonpath import Match, PathMissing, format_path, get, parse_path
from comfyui_tpu.metadata.jsontext import MAX_DEPTH, dump, load, parse

KEYS = ["a", "seed", "3", "57:12", "", " ", "$", "a.b", "x[0]", 'q"q', "q'q", "a=b", "节点", "\n", "\\", "\ud800", "-1"]


def random_json(random_: random.Random, depth: int = 4) -> object:
    kind = random_.randrange(7 if depth else 5)
    if kind == 5:
        return [random_json(random_, depth - 1) for _ in range(random_.randrange(4))]
    if kind == 6:
        return {random_.choice(KEYS): random_json(random_, depth - 1) for _ in range(random_.randrange(5))}
    return [None, random_.random() < 0.5, random_.randrange(-5, 5), random_.random(), random_.choice(KEYS)][kind]


def places(value: object, path: tuple = ()) -> list[tuple[tuple, object]]:
    found = [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in items:
        found += places(each, (*path, key))
    return found


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_what_json_has_no_number_for_becomes_null(text):
    assert parse(f'{{"a": [{text}]}}') == {"a": [None]}
    assert "NaN" not in dump(load({"a": math.nan}))


@pytest.mark.parametrize("text", ["", "{", "{'a': 1}", "nan", "[1,]", "word", "\x00", "1" * 5000])
def test_what_is_not_json_is_shown_in_the_error(text):
    with pytest.raises(MetadataError, match="expected JSON, got"):
        parse(text)


@pytest.mark.parametrize("depth", [MAX_DEPTH + 2, 100_000])
def test_json_that_is_nested_too_deeply_is_refused(depth):
    with pytest.raises(MetadataError, match="levels deep"):
        parse("[" * depth + "]" * depth)
    assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH)


def test_objects_are_taken_like_their_text_and_others_are_refused_by_type():
    cycle = []
    cycle.append(cycle)
    assert load({"a": (1, 2)}) == {"a": [1, 2]}
    for value, message in ((object(), "builtins.object"), ({"a": {1}}, "set"), (cycle, "Circular")):
        with pytest.raises(MetadataError, match=message):
            load(value)


def test_dumped_text_can_be_sent_anywhere():
    assert dump({"标题": "\ud800"}, indent=None).encode() == '{"标题": "?"}'.encode()


def test_every_place_is_found_by_the_path_that_is_shown_for_it():
    random_ = random.Random(0)
    for _ in range(300):
        value = random_json(random_)
        for path, expected in places(value):
            text = format_path(list(path))
            assert parse_path(text) == list(path)
            assert get(value, text) is expected


def test_paths_of_random_characters_give_a_value_or_a_metadata_error():
    random_ = random.Random(1)
    value = {"a": [{"id": 7, "b": {"c": 1}}, [1, 2]], "3": {"inputs": {"seed": 5}}}
    outcomes = set()
    for _ in range(5000):
        path = "".join(random_.choices("ab3c.[]=\"'07-id$ \\" + string.punctuation, k=random_.randrange(8)))
        try:
            get(value, path)
            outcomes.add("value")
        except PathMissing:
            outcomes.add("missing")
        except MetadataError:
            outcomes.add("malformed")
    assert outcomes == {"value", "missing", "malformed"}


VALUE = {"3": {"inputs": {"seed": 5}}, "nodes": [{"id": 7, "pos": [1, 2]}, {"id": 9}], "a.b": {"": 0}}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("3.inputs.seed", 5),
        ("$.3.inputs.seed", 5),
        (" nodes[0].pos[1] ", 2),
        ("nodes.0.pos.-1", 2),
        ("nodes[-2].id", 7),
        ("nodes[id=7].pos", [1, 2]),
        ('["a.b"][""]', 0),
        ("['a.b']['']", 0),
        ("", VALUE),
        ("$", VALUE),
    ],
)
def test_paths_as_people_write_them(path, expected):
    assert get(VALUE, path) == expected


@pytest.mark.parametrize(
    "path", [".", "a.", "a..b", "[", "a]", "[a]", "nodes[0", '["a', "$a[", ".a.", "a[1 ]", "[99999999999]"]
)
def test_a_malformed_path_is_told_from_a_missing_value(path):
    with pytest.raises(MetadataError, match="expected a path such as"):
        get(VALUE, path)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("3.inputs.sed", r"nothing at '3.inputs.sed': '3.inputs' is an object with the keys seed"),
        ("nodes[2]", r"'nodes' is a list of 2"),
        ("nodes[id=8]", r"nothing at 'nodes\[id=8\]'"),
        ("nodes.first", "list of 2"),
        ("3.inputs.seed.x", "is a number"),
    ],
)
def test_a_missing_value_is_an_error_that_says_what_is_there(path, message):
    with pytest.raises(PathMissing, match=message):
        get(VALUE, path)


@pytest.mark.parametrize(
    ("default", "expected"),
    [("5", 5), ("true", True), ('""', ""), ("[1]", [1]), ("some text", "some text"), ("NaN", None)],
)
def test_the_default_stands_in_for_a_missing_value_only(default, expected):
    assert extract(VALUE, "nowhere", default) == expected
    assert extract(VALUE, "nodes[1].id", default) == 9
    with pytest.raises(MetadataError, match="expected a path"):
        extract(VALUE, "[", default)


def test_a_missing_value_without_a_default_is_an_error():
    with pytest.raises(MetadataError, match="Set default"):
        extract(VALUE, "nowhere", "")


@pytest.mark.parametrize(
    ("to", "value", "expected"),
    [
        (convert.to_int, "12", 12),
        (convert.to_int, 2**70, 2**70),
        (convert.to_int, str(2**64 - 1), 2**64 - 1),
        (convert.to_int, -1.9, -1),
        (convert.to_int, "1e3", 1000),
        (convert.to_int, True, 1),
        (convert.to_float, "0.5", 0.5),
        (convert.to_boolean, " Yes ", True),
        (convert.to_boolean, 0.0, False),
        (convert.to_text, {"a": [1]}, '{\n  "a": [\n    1\n  ]\n}'),
        (convert.to_text, None, "null"),
        (convert.to_text, "a", "a"),
    ],
)
def test_conversions(to, value, expected):
    assert to(value) == expected
    assert type(to(value)) is type(expected)


@pytest.mark.parametrize("value", ["word", "", None, [1], {}, "nan", "1e999", 10**400])
@pytest.mark.parametrize("to", [convert.to_int, convert.to_float, convert.to_boolean])
def test_what_cannot_be_converted_is_an_error_not_zero(to, value):
    if value == 10**400 and to is not convert.to_float:
        assert to(value)
    else:
        with pytest.raises(MetadataError, match="expected a"):
            to(value)


def test_equal_values_have_no_differences():
    random_ = random.Random(2)
    for _ in range(200):
        value = random_json(random_)
        assert compare(value, copy.deepcopy(value)) == []
    assert compare(1, 1.0) == []
    assert describe([]) == "No differences."


def test_each_change_is_reported_once_at_its_path():
    random_ = random.Random(3)
    tried = 0
    while tried < 200:
        old = random_json(random_)
        leaves = [path for path, value in places(old) if path and not isinstance(value, dict | list)]
        if not leaves:
            continue
        tried += 1
        new, path = copy.deepcopy(old), random_.choice(leaves)
        parent = get(new, format_path(list(path[:-1])))
        before, parent[path[-1]] = parent[path[-1]], "changed!"
        assert compare(old, new) == [Change(CHANGED, format_path(list(path)), before, "changed!")]


def test_added_and_removed_keys():
    assert compare({"a": 1, "b": {}}, {"b": {"c": True}}) == [
        Change(REMOVED, "a", old=1),
        Change(ADDED, "b.c", new=True),
    ]
    assert compare([1, 2], [1]) == [Change(REMOVED, "[1]", old=2)]
    assert compare(True, 1) == [Change(CHANGED, "$", True, 1)]


def test_nodes_are_compared_by_id_so_that_an_inserted_one_is_the_only_difference():
    old = {"nodes": [{"id": 1, "x": 0}, {"id": 2, "x": 0}]}
    new = {"nodes": [{"id": 5, "x": 0}, {"id": 1, "x": 0}, {"id": 2, "x": 3}]}
    assert compare(old, new) == [
        Change(CHANGED, "nodes[id=2].x", 0, 3),
        Change(ADDED, "nodes[id=5]", new={"id": 5, "x": 0}),
    ]
    assert get(new, "nodes[id=2].x") == 3
    assert compare(old, {"nodes": old["nodes"][::-1]}) == [Change(REORDERED, "nodes", ["1", "2"], ["2", "1"])]
    assert parse_path("nodes[id=2]")[1] == Match("id", "2")


def test_lists_with_ids_twice_are_compared_item_by_item():
    twice = [{"id": 1, "a": 0}, {"id": 1, "a": 1}]
    assert [change.path for change in compare(twice, [{"id": 1, "a": 0}, {"id": 1, "a": 2}])] == ["[1].a"]


def test_differences_read_well():
    old, new = {"seed": 1, "gone": [1]}, {"seed": 2, "long": "x" * 1000}
    lines = describe(compare(old, new)).splitlines()
    assert lines[:4] == ["3 differences: 1 added, 1 removed, 1 changed", "", "~ seed: 1 → 2", "- gone: [1]"]
    assert lines[4].startswith('+ long: "xxx')
    assert len(lines[4]) < 400


def test_differences_without_end_are_cut():
    changes = compare(list(range(5000)), list(range(1, 5001)))
    assert len(changes) == MAX_CHANGES
    assert f"only the first {MAX_CHANGES}" in describe(changes)


def test_the_whole_of_a_big_workflow_is_compared_in_a_moment():
    workflow = {"nodes": [{"id": i, "widgets_values": [i, "text"] * 10} for i in range(3000)]}
    changed = json.loads(json.dumps(workflow))
    changed["nodes"][1500]["widgets_values"][3] = "other"
    assert [change.path for change in compare(workflow, changed)] == ["nodes[id=1500].widgets_values[3]"]
