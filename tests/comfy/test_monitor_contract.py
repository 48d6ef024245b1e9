"""The monitor's nodes as users' workflows know them, their texts in both languages, their help pages."""

import json

import pytest

from tests.comfy.contract import Contract, Node

pytestmark = pytest.mark.server

ANY, METADATA, PIPE = ("*", {}), ("METADATA_RAW_TPU", {}), ("PIPE_TPU", {})
IMAGE, TEXT, METADATA_OUT = ("IMAGE", {}), ("STRING", {"default": ""}), ("METADATA_RAW_TPU", "metadata_raw")
ANY_8 = {f"any_{i}": ANY for i in range(1, 9)}
ANY_6 = {f"any_{i}": ANY for i in range(1, 7)}
PARTS = {"default": "prompt", "options": ["prompt", "workflow", "fileinfo", "extra", "everything"]}
SWITCHED = {kind: kind.upper() for kind in ("Latent", "Conditioning", "Image", "Mask", "String")} | {"Any": "*"}
PRIMITIVES = {
    "Boolean": ("Boolean", "BOOLEAN", {"default": False}),
    "String": ("String", "STRING", {"default": ""}),
    "StringMultiline": ("String (Multiline)", "STRING", {"multiline": True}),
    "Integer": ("Integer", "INT", {"default": 0, "control_after_generate": False}),
    "Float": ("Float", "FLOAT", {"default": 0.0, "round": False}),
}

CONTRACTS = {
    "Metadata": {
        "LoadImageWithMetadataTPU": Node(
            "Load Image with Metadata (TPU)",
            {"image": ("COMBO", {"image_upload": True})},
            {"video_frames": ("INT", {"default": 1, "min": 0})},
            [
                ("IMAGE", "image"),
                ("MASK", "mask"),
                ("STRING", "prompt"),
                METADATA_OUT,
                ("STRING", "workflow"),
                ("STRING", "fileinfo"),
            ],
        ),
        "SaveImageWithMetadataTPU": Node(
            "Save Image with Extra Metadata (TPU)",
            {
                "image": IMAGE,
                "filename_prefix": ("STRING", {"default": "ComfyUI"}),
                "with_workflow": ("BOOLEAN", {"default": True}),
            },
            {"metadata_extra": ("STRING", {"multiline": True})},
            [METADATA_OUT],
        ),
        "PreviewFromImageTPU": Node(
            "Preview from Image (TPU)", {}, {"image": IMAGE, "metadata_raw": METADATA}, [METADATA_OUT]
        ),
        "MetadataExtractorTPU": Node(
            "Metadata Extractor (TPU)",
            {"metadata_raw": METADATA},
            {},
            [("STRING", name) for name in ("prompt", "workflow", "fileinfo", "extra", "raw_to_json")],
        ),
        "MetadataComparatorTPU": Node(
            "Metadata Comparator (TPU)",
            {"metadata_raw_old": METADATA, "metadata_raw_new": METADATA, "what": ("COMBO", PARTS)},
            {},
            [("STRING", "difference")],
        ),
        "ImageResolutionTPU": Node(
            "Image Resolution (TPU)",
            {"image": IMAGE},
            {},
            [("INT", "width"), ("INT", "height"), ("INT", "count")],
        ),
    },
    "Debug": {
        "ShowAnyTPU": Node(
            "Show Any (TPU)",
            {"any_value": ANY},
            {"display": ("BOOLEAN", {"default": True}), "console": ("BOOLEAN", {"default": False}), "prefix": TEXT},
            [("STRING", "text")],
        ),
        "StatsSystemTPU": Node("Stats System (TPU)", {}, {"any_value": ANY}, [("*", "any_value"), ("STRING", "stats")]),
    },
    "JSON": {
        "ShowAnyToJsonTPU": Node("Show Any to JSON (TPU)", {"any_value": ANY}, {}, [("STRING", "json")]),
        "JsonComparatorTPU": Node(
            "JSON Comparator (TPU)",
            {"json_old": ANY, "json_new": ANY},
            {},
            [("STRING", "difference"), ("BOOLEAN", "equal")],
        ),
        "JsonExtractorTPU": Node(
            "JSON Extractor (TPU)",
            {"json": ANY, "path": TEXT},
            {"default": TEXT},
            [("*", "value"), ("STRING", "string"), ("INT", "int"), ("FLOAT", "float"), ("BOOLEAN", "boolean")],
        ),
        "ReadJsonFileTPU": Node("Read JSON File (TPU)", {"path": TEXT}, {}, [("STRING", "json"), ("*", "value")]),
    },
    "List": {
        "ListAnyTPU": Node("List of Any (TPU)", {}, ANY_8, [("*", "any_list"), ("*", "items")]),
        "ListStringTPU": Node(
            "List of Strings (TPU)",
            {},
            {f"string_{i}": TEXT for i in range(1, 9)} | {"delimiter": ("STRING", {"default": " "})},
            [("STRING", "concatenated"), ("STRING", "strings")],
        ),
    },
    "Switch": {
        f"Switch{kind}TPU": Node(
            f"Switch {kind} (TPU)",
            {"boolean": ("BOOLEAN", {"default": True})},
            {"on_true": (type_, {"lazy": True}), "on_false": (type_, {"lazy": True})},
            [(type_, "value")],
        )
        for kind, type_ in SWITCHED.items()
    },
    "Pipe": {
        "PipeToAnyTPU": Node("Pipe to Any (TPU)", {}, ANY_6, [("PIPE_TPU", "pipe")]),
        "PipeEditAnyTPU": Node("Pipe Edit Any (TPU)", {"pipe": PIPE}, ANY_6, [("PIPE_TPU", "pipe")]),
        "PipeFromAnyTPU": Node(
            "Pipe from Any (TPU)", {"pipe": PIPE}, {}, [("PIPE_TPU", "pipe"), *(("*", name) for name in ANY_6)]
        ),
    },
    "Primitive": {
        f"Primitive{name}TPU": Node(f"Primitive {label} (TPU)", {"value": (type_, widget)}, {}, [(type_, "value")])
        for name, (label, type_, widget) in PRIMITIVES.items()
    },
}
CONTRACTS = {
    family: Contract("ComfyUI-TPU-Monitor", f"TPU/Monitor/{family}", nodes) for family, nodes in CONTRACTS.items()
}
NODES = {node_id: contract for contract in CONTRACTS.values() for node_id in contract.nodes}
LISTS = {"ListAnyTPU": [False, True], "ListStringTPU": [False, True]}


def test_these_are_all_nodes_of_the_pack(object_info):
    found = {node_id for node_id, info in object_info.items() if info["category"].startswith("TPU/Monitor")}
    assert found == set(NODES)
    assert all(node_id.endswith("TPU") for node_id in found)


@pytest.mark.parametrize("node_id", NODES)
def test_the_node_is_what_users_workflows_expect(object_info, node_id):
    NODES[node_id].check_schema(object_info, node_id)
    info = object_info[node_id]
    assert info["output_is_list"] == LISTS.get(node_id, [False] * len(info["output"]))


@pytest.mark.parametrize("node_id", NODES)
def test_everything_has_a_description_in_english_and_chinese_that_the_server_serves(server, object_info, node_id):
    NODES[node_id].check_texts(server, object_info, node_id)


@pytest.mark.parametrize("node_id", NODES)
@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_help_page_is_where_the_frontend_asks_for_it(server, object_info, node_id, language):
    NODES[node_id].check_help_page(server, object_info, node_id, language)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_no_text_of_a_node_that_is_gone_is_left(language):
    folder = CONTRACTS["JSON"].folder
    assert set(json.loads((folder / "locales" / language / "nodeDefs.json").read_text())) == set(NODES)
    assert {path.parent.name for path in (folder / "web" / "docs").glob(f"*/{language}.md")} == set(NODES)


def test_the_newest_pictures_are_offered_and_other_files_are_not(server):
    folder = server.base / "input"
    for name in ("listed.png", "listed.JPG", "listed.txt", ".hidden.png"):
        (folder / name).write_bytes(b"")
    info = server.get("/object_info/LoadImageWithMetadataTPU")["LoadImageWithMetadataTPU"]
    options = info["input"]["required"]["image"][1]["options"]
    assert {name for name in options if "listed" in name or "hidden" in name} == {"listed.png", "listed.JPG"}
