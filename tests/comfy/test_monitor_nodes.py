"""The monitor's nodes in workflows on a real server."""

from __future__ import annotations

import json
import os
import time

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from bootstrap.workflow import to_api_prompt
from tests.comfy.server import REPOSITORY, Refused

pytestmark = pytest.mark.server

LOAD, SAVE = "LoadImageWithMetadataTPU", "SaveImageWithMetadataTPU"
WORKFLOW = {"nodes": [{"id": 1, "type": "Note"}], "links": []}


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def run(server, workflow=None, /, **nodes):
    """Runs nodes given by their id; fails with the node's error."""
    done = server.run(nodes, workflow=workflow)
    assert done.succeeded, done.why
    return done


def text(done, node_id: str) -> str:
    return "\n".join(done.outputs[node_id]["text"])


@pytest.fixture(scope="module")
def picture(server) -> str:
    """A transparent picture with an old workflow in it, in a subfolder of the input folder."""
    path = server.base / "input" / "sub" / "old.png"
    path.parent.mkdir(exist_ok=True)
    (server.base / "output").mkdir(exist_ok=True)  # where ProbeSave writes
    texts = PngInfo()
    texts.add_text("prompt", '{"3": {"class_type": "KSampler", "inputs": {"seed": 7, "cfg": NaN}}}')
    texts.add_text("workflow", json.dumps(WORKFLOW))
    texts.add_itxt("Author", "李", zip=True)
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 4), np.uint8)
    Image.fromarray(pixels).save(path, pnginfo=texts)
    return "sub/old.png"


def test_a_picture_is_loaded_as_core_loads_it_with_all_that_is_stored_in_it(server, picture):
    done = run(
        server,
        core=node("LoadImage", image=picture),
        ours=node(LOAD, image=picture),
        a=node("ProbeSave", value=["core", 0], name="core_image"),
        b=node("ProbeSave", value=["ours", 0], name="our_image"),
        c=node("ProbeSave", value=["core", 1], name="core_mask"),
        d=node("ProbeSave", value=["ours", 1], name="our_mask"),
        prompt=node("ShowAnyTPU", any_value=["ours", 2]),
        workflow=node("ShowAnyTPU", any_value=["ours", 4]),
        fileinfo=node("ShowAnyTPU", any_value=["ours", 5]),
    )
    saved = {name: torch.load(done.outputs[name]["path"][0]) for name in "abcd"}
    assert torch.equal(saved["a"], saved["b"])
    assert torch.equal(saved["c"], saved["d"])
    assert json.loads(text(done, "prompt"))["3"]["inputs"] == {"seed": 7, "cfg": None}
    assert json.loads(text(done, "workflow")) == WORKFLOW
    info = json.loads(text(done, "fileinfo"))
    assert (info["filename"], info["subfolder"], info["type"]) == ("old.png", "sub", "input")
    assert (info["format"], info["width"], info["height"], info["frames"]) == ("PNG", 24, 16, 1)


def test_what_was_saved_is_read_again_compared_and_shown(server, picture):
    extra = json.dumps({"Title": "Sunset", "作者": "李", "settings": {"steps": 4}})
    image, pair = {"image": ["load", 0]}, {"metadata_raw_old": ["load", 3], "metadata_raw_new": ["save", 0]}
    done = run(
        server,
        WORKFLOW,
        load=node(LOAD, image=picture),
        save=node(SAVE, **image, filename_prefix="mine/a", with_workflow=True, metadata_extra=extra),
        bare=node(SAVE, **image, filename_prefix="mine/b", with_workflow=False, metadata_extra=""),
        taken=node("MetadataExtractorTPU", metadata_raw=["save", 0]),
        extra=node("ShowAnyTPU", any_value=["taken", 3]),
        all=node("ShowAnyToJsonTPU", any_value=["bare", 0]),
        difference=node("MetadataComparatorTPU", **pair, what="prompt"),
        same=node("MetadataComparatorTPU", **pair, what="workflow"),
        preview=node("PreviewFromImageTPU", metadata_raw=["load", 3]),
        temporary=node("PreviewFromImageTPU", image=["load", 0]),
    )
    (file,) = done.outputs["save"]["images"]
    assert (file["subfolder"], file["type"]) == ("mine", "output")
    with Image.open(server.base / "output" / "mine" / file["filename"]) as saved:
        assert saved.text["Title"] == "Sunset"
        assert json.loads(saved.text["settings"]) == {"steps": 4}
        assert json.loads(saved.text["workflow"]) == WORKFLOW
        assert "load" in json.loads(saved.text["prompt"])
    stored = {"Title": "Sunset", "settings": {"steps": 4}, "extra_metadata": {"作者": "李"}}
    assert json.loads(text(done, "extra")) == stored
    bare = json.loads(text(done, "all"))
    assert (bare["prompt"], bare["workflow"], bare["extra"]) == (None, None, {})
    assert "- 3: {" in text(done, "difference")
    assert "+ load: {" in text(done, "difference")
    assert text(done, "same") == "No differences."
    assert done.outputs["preview"]["images"] == [{"filename": "old.png", "subfolder": "sub", "type": "input"}]
    assert "Resolution: 24 × 16" in text(done, "preview")
    (file,) = done.outputs["temporary"]["images"]
    assert file["type"] == "temp"
    assert server.get_bytes("/view?type=temp&filename=" + file["filename"]).startswith(b"\x89PNG")
    assert not list((server.base / "output" / "mine").glob(".*"))


def test_numbers_in_file_names_go_on(server, picture):
    nodes = {
        "load": node(LOAD, image=picture),
        "save": node(SAVE, image=["load", 0], filename_prefix="counted", with_workflow=False),
    }
    names = []
    for round_ in ("1", "2"):
        nodes["save"]["inputs"]["metadata_extra"] = json.dumps({"round": round_})
        names.append(run(server, **nodes).outputs["save"]["images"][0]["filename"])
    assert names == ["counted_00001_.png", "counted_00002_.png"]


def test_a_changed_file_is_loaded_anew_and_an_unchanged_one_is_not(server):
    path = server.base / "input" / "changing.png"
    nodes = {
        "load": node(LOAD, image="changing.png"),
        "size": node("ImageResolutionTPU", image=["load", 0]),
    }
    Image.new("RGB", (8, 8)).save(path)
    assert text(run(server, **nodes), "size") == "8 × 8"
    assert "load" in run(server, **nodes).of("execution_cached")[0]["nodes"]
    Image.new("RGB", (12, 8)).save(path)
    os.utime(path, ns=(time.time_ns(), time.time_ns()))
    assert text(run(server, **nodes), "size") == "12 × 8"


@pytest.mark.parametrize("name", ["missing.png", "../server.log", "/etc/passwd", "sub/../../server.log", "escape.png"])
def test_a_file_outside_of_the_folders_is_refused_before_anything_runs(server, name):
    link = server.base / "input" / "escape.png"
    if not link.is_symlink():
        link.symlink_to(server.base / "server.log")
    for prompt in (
        {"1": node(LOAD, image=name), "2": node("ShowAnyTPU", any_value=["1", 2])},
        {"1": node("ReadJsonFileTPU", path=name), "2": node("ShowAnyTPU", any_value=["1", 0])},
    ):
        with pytest.raises(Refused) as refused:
            server.run(prompt)
        details = str(refused.value.body["node_errors"]["1"])
        assert "ComfyUI's input folder" in details


def test_a_file_outside_of_the_folders_is_refused_when_its_name_comes_through_a_link(server):
    done = server.run(
        {
            "name": node("PrimitiveStringTPU", value="../server.log"),
            "1": node("ReadJsonFileTPU", path=["name", 0]),
            "2": node("ShowAnyTPU", any_value=["1", 0]),
        }
    )
    assert "neither absolute paths nor '..' are accepted" in done.error["exception_message"]


def test_a_damaged_file_ends_in_an_error_that_names_it(server, picture):
    whole = (server.base / "input" / picture).read_bytes()
    (server.base / "input" / "cut.png").write_bytes(whole[:-30])
    done = server.run({"1": node(LOAD, image="cut.png"), "2": node("ShowAnyTPU", any_value=["1", 2])})
    assert "cut off" in done.error["exception_message"]


def test_a_video_of_cores_save_video_gives_its_workflow_back(server, picture):
    done = run(
        server,
        WORKFLOW,
        load=node(LOAD, image=picture),
        frames=node("RepeatImageBatch", image=["load", 0], amount=5),
        video=node("CreateVideo", images=["frames", 0], fps=10.0),
        save=node("SaveVideo", video=["video", 0], filename_prefix="video/v", format="auto", codec="auto"),
    )
    file = done.outputs["save"]["images"][0]
    name = f"{file['subfolder']}/{file['filename']} [output]"
    inputs = server.get(f"/object_info/{LOAD}")[LOAD]["input"]["required"]
    assert name in inputs["image"][1]["options"]
    done = run(
        server,
        load=node(LOAD, image=name, video_frames=0),
        taken=node("MetadataExtractorTPU", metadata_raw=["load", 3]),
        workflow=node("ShowAnyTPU", any_value=["taken", 1]),
        info=node("ShowAnyTPU", any_value=["taken", 2]),
        size=node("ImageResolutionTPU", image=["load", 0]),
        preview=node("PreviewFromImageTPU", metadata_raw=["load", 3]),
    )
    assert json.loads(text(done, "workflow")) == WORKFLOW
    info = json.loads(text(done, "info"))
    assert (info["format"], info["frames"], info["fps"], info["duration"]) == ("MP4", 5, 10.0, 0.5)
    assert text(done, "size") == "24 × 16, 5 pictures"
    assert done.outputs["preview"]["animated"] == [True]


ANIMATED = {
    "SaveAnimatedWEBP": {"lossless": True, "quality": 80, "method": "fastest"},
    "SaveAnimatedPNG": {"compress_level": 4},
}


@pytest.mark.parametrize("saver", ANIMATED)
def test_an_animation_of_cores_nodes_gives_its_workflow_back(server, saver):
    done = run(
        server,
        WORKFLOW,
        a=node("EmptyImage", width=24, height=16, batch_size=1, color=255),
        b=node("EmptyImage", width=24, height=16, batch_size=1, color=65280),
        both=node("ImageBatch", image1=["a", 0], image2=["b", 0]),
        save=node(saver, images=["both", 0], filename_prefix="animated", fps=4.0, **ANIMATED[saver]),
    )
    name = done.outputs["save"]["images"][0]["filename"]
    done = run(
        server,
        load=node(LOAD, image=f"{name} [output]"),
        workflow=node("ShowAnyTPU", any_value=["load", 4]),
        prompt=node("JsonExtractorTPU", json=["load", 2], path="a.inputs.color"),
        colour=node("ShowAnyTPU", any_value=["prompt", 2]),
        info=node("ShowAnyTPU", any_value=["load", 5]),
        size=node("ImageResolutionTPU", image=["load", 0]),
    )
    assert json.loads(text(done, "workflow")) == WORKFLOW
    assert text(done, "colour") == "255"
    info = json.loads(text(done, "info"))
    assert (info["frames"], info["fps"], info["duration"]) == (2, 4.0, 0.5)
    assert text(done, "size") == "24 × 16, 2 pictures"


def test_json_is_read_extracted_and_compared(server):
    content = {"nodes": [{"id": 7, "seed": 12}, {"id": 9, "seed": "abc"}], "on": True}
    (server.base / "input" / "settings.json").write_text(json.dumps(content), encoding="utf-8-sig")
    changed = {**content, "nodes": [{"id": 9, "seed": "abc"}]}
    done = run(
        server,
        file=node("ReadJsonFileTPU", path="settings.json"),
        other=node("PrimitiveStringMultilineTPU", value=json.dumps(changed)),
        seed=node("JsonExtractorTPU", json=["file", 1], path="nodes[id=7].seed"),
        word=node("JsonExtractorTPU", json=["file", 0], path="nodes[1].seed"),
        default=node("JsonExtractorTPU", json=["file", 0], path="nowhere", default="5"),
        number=node("ShowAnyTPU", any_value=["seed", 2]),
        text=node("ShowAnyTPU", any_value=["word", 1]),
        five=node("ShowAnyTPU", any_value=["default", 3]),
        compared=node("JsonComparatorTPU", json_old=["file", 0], json_new=["other", 0]),
        equal=node("ShowAnyTPU", any_value=["compared", 1]),
    )
    assert [text(done, name) for name in ("number", "text", "five", "equal")] == ["12", "abc", "5.0", "false"]
    assert '- nodes[id=7]: {"id": 7, "seed": 12}' in text(done, "compared")
    assert "nodes[id=9]" not in text(done, "compared")


def test_only_the_node_that_wants_a_number_is_stopped_where_there_is_none(server):
    prompt = {
        "json": node("PrimitiveStringTPU", value='{"a": "word"}'),
        "1": node("JsonExtractorTPU", json=["json", 0], path="a"),
        "2": node("ShowAnyTPU", any_value=["1", 1]),
        "3": node("ShowAnyTPU", any_value=["1", 2]),
    }
    done = server.run(prompt)
    assert done.error["node_id"] == "3"
    assert "expected a number, got text 'word'" in done.error["exception_message"]
    del prompt["3"]
    assert text(run(server, **prompt), "2") == "word"


BRANCHES = ("on_true", "on_false")
# A node that makes the value ``i``, 0 to 3, for each type.
KINDS = {
    "Any": lambda i: node("ProbeFill", kind="LATENT", shape="1,4,3,3", value=str(i)),
    "Latent": lambda i: node("ProbeFill", kind="LATENT", shape="1,4,2,2", value=str(i)),
    "Conditioning": lambda i: node("ProbeFill", kind="CONDITIONING", shape="1,4,2", value=str(i)),
    "Image": lambda i: node("EmptyImage", width=8, height=8, batch_size=1, color=i),
    "Mask": lambda i: node("SolidMask", value=i / 4, width=8, height=8),
}


@pytest.mark.parametrize("boolean", [True, False])
def test_a_switch_runs_only_the_chosen_branch(server, boolean):
    """The branches' values differ from run to run, so that none is cached."""
    nodes = {}
    for kind, source in KINDS.items():
        for i, branch in enumerate(BRANCHES):
            nodes[f"{kind}_{branch}"] = source(i + 2 * boolean)
        branches = {branch: [f"{kind}_{branch}", 0] for branch in BRANCHES}
        nodes[f"{kind}_switch"] = node(f"Switch{kind}TPU", boolean=boolean, **branches)
        nodes[f"{kind}_show"] = node("ShowAnyTPU", any_value=[f"{kind}_switch", 0])
    nodes["String_switch"] = node("SwitchStringTPU", boolean=boolean, on_true="yes", on_false="no")
    nodes["String_show"] = node("ShowAnyTPU", any_value=["String_switch", 0])
    done = run(server, **nodes)
    executed = {event["node"] for event in done.of("executing")}
    chosen, other = BRANCHES if boolean else reversed(BRANCHES)
    assert {f"{kind}_{chosen}" for kind in KINDS} <= executed
    assert not {f"{kind}_{other}" for kind in KINDS} & executed
    assert text(done, "String_show") == ("yes" if boolean else "no")
    assert f'"mean": {int(not boolean) + boolean * 2}' in text(done, "Latent_show")


def test_a_switch_without_its_chosen_branch_says_so(server):
    done = server.run({"1": node("SwitchAnyTPU", boolean=True), "2": node("ShowAnyTPU", any_value=["1", 0])})
    assert "on_true is chosen, but nothing is connected" in done.error["exception_message"]


def test_a_list_gives_its_items_one_by_one_or_as_one(server):
    done = run(
        server,
        a=node("PrimitiveIntegerTPU", value=0),
        b=node("PrimitiveBooleanTPU", value=False),
        c=node("PrimitiveFloatTPU", value=0.25),
        list=node("ListAnyTPU", any_1=["a", 0], any_3=["b", 0], any_8=["c", 0]),
        whole=node("ShowAnyTPU", any_value=["list", 0]),
        words=node("ListStringTPU", string_1="x", string_2="", string_5="y", delimiter="-"),
        joined=node("ShowAnyTPU", any_value=["words", 0]),
        each=node("StringConcatenate", string_a=["words", 1], string_b="!", delimiter=""),
        marked=node("ShowAnyToJsonTPU", any_value=["each", 0]),
    )
    assert json.loads(text(done, "whole")) == [0, False, 0.25]
    assert text(done, "joined") == "x-y"
    assert json.loads(text(done, "marked")) == ["x!", "y!"]


def test_pipes_carry_six_values_and_are_never_changed_in_place(server):
    done = run(
        server,
        a=node("PrimitiveStringTPU", value="first"),
        b=node("PrimitiveStringTPU", value="sixth"),
        c=node("PrimitiveStringTPU", value="edited"),
        pipe=node("PipeToAnyTPU", any_1=["a", 0], any_6=["b", 0]),
        edit=node("PipeEditAnyTPU", pipe=["pipe", 0], any_1=["c", 0], any_2=["a", 0]),
        old=node("PipeFromAnyTPU", pipe=["pipe", 0]),
        new=node("PipeFromAnyTPU", pipe=["edit", 0]),
        old_1=node("ShowAnyTPU", any_value=["old", 1]),
        new_1=node("ShowAnyTPU", any_value=["new", 1]),
        new_2=node("ShowAnyTPU", any_value=["new", 2]),
        new_6=node("ShowAnyTPU", any_value=["new", 6]),
    )
    assert [text(done, name) for name in ("old_1", "new_1", "new_2", "new_6")] == ["first", "edited", "first", "sixth"]
    done = server.run(
        {
            "a": node("PrimitiveStringTPU", value="first"),
            "pipe": node("PipeToAnyTPU", any_1=["a", 0]),
            "old": node("PipeFromAnyTPU", pipe=["pipe", 0]),
            "show": node("ShowAnyTPU", any_value=["old", 4]),
        }
    )
    assert "any_4 of the pipe is empty" in done.error["exception_message"]


def test_stats_hand_their_input_on_and_look_anew_each_time(server):
    nodes = {
        "a": node("PrimitiveStringTPU", value="through"),
        "stats": node("StatsSystemTPU", any_value=["a", 0]),
        "value": node("ShowAnyTPU", any_value=["stats", 0]),
        "json": node("ShowAnyTPU", any_value=["stats", 1]),
    }
    done = run(server, **nodes)
    assert text(done, "value") == "through"
    first = json.loads(text(done, "json"))
    assert 0 < first["ram"]["used"] <= first["ram"]["total"]
    assert "RAM " in text(done, "stats")
    assert "TPU: not available" in text(done, "stats")
    assert json.loads(text(run(server, **nodes), "json"))["time"] > first["time"]


def test_the_console_gets_what_is_shown(server):
    done = run(
        server,
        a=node("PrimitiveStringTPU", value="a line for the log"),
        show=node("ShowAnyTPU", any_value=["a", 0], display=False, console=True, prefix="here"),
    )
    assert text(done, "show") == ""
    assert "here: a line for the log" in server.log()


def test_the_script_that_shows_texts_is_given_to_the_browser(server):
    (script,) = [path for path in server.get("/extensions") if path.endswith("ComfyUI-TPU-Monitor/nodes.js")]
    assert b"textarea" in server.get_bytes(script)


def test_the_example_runs_and_shows_what_it_stored(server):
    workflow = json.loads((REPOSITORY / "examples" / "monitor_metadata.json").read_text(encoding="utf-8"))
    server.upload("example.png", Image.new("RGB", (64, 64)))
    nodes = to_api_prompt(workflow, server.get("/object_info"))
    done = server.run(nodes, workflow=workflow)
    assert done.succeeded, done.why
    shown = {node_id: text(done, node_id) for node_id in done.outputs if "text" in done.outputs[node_id]}
    assert {"An example", "LoadImageWithMetadataTPU"} <= set(shown.values())
    assert any(each.startswith("2 differences: 2 added") for each in shown.values())
