"""A saved workflow becomes the prompt the server executes."""

from __future__ import annotations

import pytest

from bootstrap.workflow import WorkflowError, to_api_prompt

OBJECT_INFO = {
    "Loader": {"input": {"required": {"name": [["a.safetensors", "b.safetensors"], {}]}}, "display_name": "Load"},
    "Text": {"input": {"required": {"model": ["MODEL", {}], "text": ["STRING", {"multiline": True}]}}},
    "Sampler": {
        "input": {
            "required": {
                "model": ["MODEL", {}],
                "seed": ["INT", {"default": 0, "control_after_generate": True}],
                "steps": ["INT", {"default": 20}],
                "method": ["COMBO", {"options": ["x", "y"]}],
            },
            "optional": {"shift": ["FLOAT", {"default": 5.0}], "hint": ["FLOAT", {"default": 1.0, "forceInput": True}]},
            "hidden": {"prompt": "PROMPT"},
        },
        "input_order": {"required": ["model", "seed", "steps", "method"], "optional": ["shift", "hint"]},
    },
    "LoadImage": {
        "input": {
            "required": {"image": [["a.png"], {"image_upload": True}]},
            "optional": {"scale": ["FLOAT", {"default": 1.0}]},
        }
    },
    "Save": {"input": {"required": {"images": ["MODEL", {}], "prefix": ["STRING", {}]}}},
}


def node(node_id, kind, values=(), inputs=(), mode=0, outputs=("MODEL",), **more):
    """`inputs`: (name, type, link) triples."""
    return {
        "id": node_id,
        "type": kind,
        "mode": mode,
        "widgets_values": values if isinstance(values, dict) else list(values),
        "inputs": [{"name": name, "type": type_, "link": link} for name, type_, link in inputs],
        "outputs": [{"name": type_, "type": type_} for type_ in outputs],
        **more,
    }


def workflow(*nodes, links=()):
    return {"nodes": list(nodes), "links": [[*link, "MODEL"] for link in links], "version": 0.4}


def test_widgets_and_links():
    saved = workflow(
        node(7, "Loader", ["b.safetensors"]),
        node(8, "Sampler", [42, "randomize", 30, "y", 3.0], [("model", "MODEL", 1)], title="My sampler"),
        node(9, "Save", ["out"], [("images", "MODEL", 2)]),
        links=[(1, 7, 0, 8, 0), (2, 8, 0, 9, 0)],
    )
    assert to_api_prompt(saved, OBJECT_INFO) == {
        "7": {"class_type": "Loader", "inputs": {"name": "b.safetensors"}, "_meta": {"title": "Load"}},
        "8": {
            "class_type": "Sampler",
            "inputs": {"seed": 42, "steps": 30, "method": "y", "shift": 3.0, "model": ["7", 0]},
            "_meta": {"title": "My sampler"},
        },
        "9": {"class_type": "Save", "inputs": {"prefix": "out", "images": ["8", 0]}, "_meta": {"title": "Save"}},
    }


def one_node(kind, values, info=None):
    info = {"input": info} if info else OBJECT_INFO[kind]
    return to_api_prompt(workflow(node(1, kind, values)), {kind: info})["1"]["inputs"]


@pytest.mark.parametrize("control", ["fixed", "increment", "decrement", "randomize"])
def test_the_value_after_a_seed_is_skipped(control):
    info = {"required": {"seed": ["INT", {"control_after_generate": True}], "steps": ["INT", {}]}}
    assert one_node("N", [1, control, 20], info) == {"seed": 1, "steps": 20}


def test_a_seed_has_that_value_also_where_the_node_does_not_say_so():
    info = {"required": {"noise_seed": ["INT", {}], "steps": ["INT", {}]}}
    assert one_node("N", [1, "fixed", 20], info) == {"noise_seed": 1, "steps": 20}


def test_a_seed_without_that_value_loses_nothing():
    info = {"required": {"seed": ["INT", {"control_after_generate": False}], "mode": ["STRING", {}]}}
    assert one_node("N", [1, "fixed"], info) == {"seed": 1, "mode": "fixed"}


def test_upload_button_saves_a_value_of_its_own():
    assert one_node("LoadImage", ["a.png", "image", 2.0]) == {"image": "a.png", "scale": 2.0}


def test_upload_button_comes_last_where_the_server_tells_the_order():
    info = {**OBJECT_INFO["LoadImage"], "input_order": {"required": ["image"], "optional": ["scale"]}}
    prompt = to_api_prompt(workflow(node(1, "LoadImage", ["a.png", 2.0, "image"])), {"LoadImage": info})
    assert prompt["1"]["inputs"] == {"image": "a.png", "scale": 2.0}


def test_input_added_after_the_workflow_was_saved_gets_its_default():
    assert one_node("Sampler", [1, "fixed", 20, "x"])["shift"] == 5.0


def test_input_without_value_and_without_default_is_named():
    with pytest.raises(WorkflowError, match="no value for its input 'steps'"):
        one_node("N", [1, "fixed"], {"required": {"seed": ["INT", {}], "steps": ["INT", {}]}})


def test_values_saved_by_name():
    assert one_node("Save", {"prefix": "p", "preview": {"hidden": 1}}) == {"prefix": "p"}


def test_a_link_wins_over_the_widget_under_it():
    saved = workflow(
        node(1, "Loader", ["a.safetensors"]),
        node(2, "Save", ["typed"], [("images", "MODEL", None), ("prefix", "STRING", 1)]),
        links=[(1, 1, 0, 2, 1)],
    )
    assert to_api_prompt(saved, OBJECT_INFO)["2"]["inputs"] == {"prefix": ["1", 0]}


def test_list_values_are_not_taken_for_links():
    assert one_node("Save", [["a", 0]]) == {"prefix": {"__value__": ["a", 0]}}


def test_reroutes_are_followed_and_notes_left_out():
    saved = workflow(
        node(1, "Loader", ["a.safetensors"]),
        node(2, "Reroute", [], [("", "*", 1)]),
        node(3, "Reroute", [], [("", "*", 2)]),
        node(4, "Save", ["p"], [("images", "MODEL", 3)]),
        node(5, "MarkdownNote", ["read me"]),
        links=[(1, 1, 0, 2, 0), (2, 2, 0, 3, 0), (3, 3, 0, 4, 0)],
    )
    prompt = to_api_prompt(saved, OBJECT_INFO)
    assert set(prompt) == {"1", "4"}
    assert prompt["4"]["inputs"]["images"] == ["1", 0]


def test_primitive_gives_its_value():
    saved = workflow(
        node(1, "PrimitiveNode", [99, "fixed"]),
        node(2, "Sampler", [1, "fixed", 20, "x"], [("seed", "INT", 1)]),
        links=[(1, 1, 0, 2, 0)],
    )
    assert to_api_prompt(saved, OBJECT_INFO)["2"]["inputs"]["seed"] == 99


def test_bypassed_node_hands_its_input_on():
    saved = workflow(
        node(1, "Loader", ["a.safetensors"]),
        node(2, "Text", ["x"], [("text", "STRING", None), ("model", "MODEL", 1)], mode=4),
        node(3, "Save", ["p"], [("images", "MODEL", 2)]),
        links=[(1, 1, 0, 2, 1), (2, 2, 0, 3, 0)],
    )
    prompt = to_api_prompt(saved, OBJECT_INFO)
    assert set(prompt) == {"1", "3"}
    assert prompt["3"]["inputs"]["images"] == ["1", 0]


def test_muted_node_takes_its_links_away():
    saved = workflow(
        node(1, "Loader", ["a.safetensors"], mode=2),
        node(2, "Save", ["p"], [("images", "MODEL", 1)]),
        links=[(1, 1, 0, 2, 0)],
    )
    assert to_api_prompt(saved, OBJECT_INFO) == {
        "2": {"class_type": "Save", "inputs": {"prefix": "p"}, "_meta": {"title": "Save"}}
    }


def test_links_in_the_newer_format():
    saved = workflow(node(1, "Loader", ["a.safetensors"]), node(2, "Save", ["p"], [("images", "MODEL", 5)]))
    saved["links"] = [{"id": 5, "origin_id": 1, "origin_slot": 0, "target_id": 2, "target_slot": 0, "type": "MODEL"}]
    assert to_api_prompt(saved, OBJECT_INFO)["2"]["inputs"]["images"] == ["1", 0]


def test_unknown_node_type_is_named():
    with pytest.raises(WorkflowError, match=r"'Wan99'.*IMPORT FAILED"):
        to_api_prompt(workflow(node(1, "Wan99")), OBJECT_INFO)


def test_link_that_leads_nowhere_is_an_error():
    saved = workflow(node(2, "Save", ["p"], [("images", "MODEL", 12)]))
    with pytest.raises(WorkflowError, match="link 12 is not in the workflow"):
        to_api_prompt(saved, OBJECT_INFO)


def test_loop_of_reroutes_is_an_error():
    saved = workflow(
        node(1, "Reroute", [], [("", "*", 2)]),
        node(2, "Reroute", [], [("", "*", 1)]),
        node(3, "Save", ["p"], [("images", "MODEL", 3)]),
        links=[(1, 1, 0, 2, 0), (2, 2, 0, 1, 0), (3, 2, 0, 3, 0)],
    )
    with pytest.raises(WorkflowError, match="is a loop"):
        to_api_prompt(saved, OBJECT_INFO)


def test_what_is_not_a_saved_workflow_is_refused():
    with pytest.raises(WorkflowError, match="expected a saved workflow"):
        to_api_prompt({"1": {"class_type": "Save", "inputs": {}}}, OBJECT_INFO)
    with pytest.raises(WorkflowError, match="subgraphs"):
        to_api_prompt({"nodes": [], "definitions": {"subgraphs": [{}]}}, OBJECT_INFO)
