"""Nodes for pictures, videos and what is stored in them."""

from __future__ import annotations

from comfy_api.latest import io

from comfyui_tpu.comfy import media
from comfyui_tpu.comfy.conversions import check_choice, check_ranges
from comfyui_tpu.comfy.inputs import limits
from comfyui_tpu.metadata.diff import compare, describe
from comfyui_tpu.metadata.errors import MetadataError
from comfyui_tpu.metadata.jsontext import dump
from comfyui_tpu.metadata.reading import PARTS, Metadata, describe_file, is_video
from comfyui_tpu.metadata.writing import check_reserved, extra_texts

CATEGORY = "TPU/Monitor/Metadata"
EVERYTHING = "everything"
RANGES = {"video_frames": (0, 100_000)}

MetadataRaw = io.Custom("METADATA_RAW_TPU")


def metadata_output(tooltip: str) -> io.Output:
    return MetadataRaw.Output("metadata_raw_out", display_name="metadata_raw", tooltip=tooltip)


def json_output(name: str, tooltip: str) -> io.Output:
    return io.String.Output(name, display_name=name, tooltip=tooltip)


PROMPT_TOOLTIP = "The executed prompt (ComfyUI's API format) as JSON; null where the file holds none."
WORKFLOW_TOOLTIP = "The workflow as the editor saved it, as JSON; null where the file holds none."
FILEINFO_TOOLTIP = "File name, size in bytes, date, format, width, height, frames, fps and duration as JSON."


def check_metadata(**values: object) -> None:
    """Any type may be linked to a custom socket through a reroute or a list."""
    for name, value in values.items():
        if not isinstance(value, Metadata):
            raise MetadataError(f"{name}: expected metadata from Load Image with Metadata, got {type(value).__name__}")


class LoadImageWithMetadataTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadImageWithMetadataTPU",
            display_name="Load Image with Metadata (TPU)",
            category=CATEGORY,
            description="Loads a picture, an animation or a video together with the prompt, the workflow and all else "
            "that is stored in it: PNG, JPEG, WebP, GIF, TIFF, AVIF, MP4, MOV, WebM and MKV.",
            inputs=[
                io.Combo.Input(
                    "image",
                    options=media.list_media(),
                    upload=io.UploadType.image,
                    tooltip="A file in ComfyUI's input folder, or one of the newest in its output folder.",
                ),
                io.Int.Input(
                    "video_frames",
                    default=1,
                    **limits(RANGES, "video_frames"),
                    optional=True,
                    tooltip="How many frames of a video to load, from its start; 0 loads all. "
                    "Animated pictures are always loaded whole.",
                ),
            ],
            outputs=[
                io.Image.Output("image_out", display_name="image", tooltip="The picture, or the frames as a batch."),
                io.Mask.Output("mask", display_name="mask", tooltip="The transparency: 1 where nothing is to be seen."),
                json_output("prompt", PROMPT_TOOLTIP),
                metadata_output("Everything that was found, for the metadata nodes."),
                json_output("workflow", WORKFLOW_TOOLTIP),
                json_output("fileinfo", FILEINFO_TOOLTIP),
            ],
        )

    @classmethod
    def validate_inputs(cls, image=None) -> bool | str:
        return media.check(image)

    @classmethod
    def fingerprint_inputs(cls, image, video_frames=1) -> str:
        return media.fingerprint(image)

    @classmethod
    def execute(cls, image: str, video_frames: int = 1) -> io.NodeOutput:
        check_ranges(RANGES, {"video_frames": video_frames})
        located = media.locate(image)
        found = located.metadata()
        pictures, mask = media.load_image(located.path, video_frames)
        return io.NodeOutput(pictures, mask, dump(found.prompt), found, dump(found.workflow), dump(found.fileinfo))


class SaveImageWithMetadataTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SaveImageWithMetadataTPU",
            display_name="Save Image with Extra Metadata (TPU)",
            category=CATEGORY,
            description="Saves pictures as PNG, with metadata of your own, and with or without the workflow.",
            inputs=[
                io.Image.Input("image", tooltip="The pictures to save, one file each."),
                io.String.Input(
                    "filename_prefix",
                    default="ComfyUI",
                    tooltip="Start of the file name in the output folder; may name a subfolder and hold "
                    "%date:yyyy-MM-dd% and the like, as in core's Save Image.",
                ),
                io.Boolean.Input(
                    "with_workflow",
                    default=True,
                    tooltip="Store prompt and workflow in the file: dropping it into ComfyUI then opens the workflow.",
                ),
                io.String.Input(
                    "metadata_extra",
                    default='{\n  "Title": "",\n  "Author": ""\n}',
                    multiline=True,
                    optional=True,
                    tooltip="A JSON object; each of its keys becomes a text of that name in the PNG.",
                ),
            ],
            outputs=[metadata_output("What is now stored in the last file.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image, filename_prefix: str, with_workflow: bool, metadata_extra: str = "") -> io.NodeOutput:
        texts = extra_texts(metadata_extra)
        if with_workflow:
            workflow = media.workflow_texts(cls.hidden.prompt, cls.hidden.extra_pnginfo)
            check_reserved(texts, set(workflow))
            texts = workflow | texts
        saved = media.save_images(image, filename_prefix, texts if media.may_write_metadata() else {})
        return io.NodeOutput(saved[-1].metadata(), ui={"images": [each.as_ui() for each in saved]})


class PreviewFromImageTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="PreviewFromImageTPU",
            display_name="Preview from Image (TPU)",
            category=CATEGORY,
            description="Shows pictures, or the file that metadata came from, with its size, date and format.",
            inputs=[
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The pictures to show. They go to ComfyUI's temp folder, with the workflow in them.",
                ),
                MetadataRaw.Input(
                    "metadata_raw",
                    optional=True,
                    tooltip="Shows the file that this metadata came from. Not used where an image is connected.",
                ),
            ],
            outputs=[metadata_output("Metadata of the file that is shown.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image=None, metadata_raw: Metadata | None = None) -> io.NodeOutput:
        if image is not None:
            texts = media.workflow_texts(cls.hidden.prompt, cls.hidden.extra_pnginfo)
            files = media.save_preview(image, texts if media.may_write_metadata() else {})
            found = files[-1].metadata()
        elif metadata_raw is not None:
            check_metadata(metadata_raw=metadata_raw)
            files, found = [media.locate_again(metadata_raw)], metadata_raw
        else:
            raise MetadataError("connect an image or metadata_raw: there is nothing to show")
        shown = {"images": [each.as_ui() for each in files], "text": [describe_file(found)]}
        return io.NodeOutput(found, ui=shown | ({"animated": [True]} if is_video(files[0].path) else {}))


class MetadataExtractorTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MetadataExtractorTPU",
            display_name="Metadata Extractor (TPU)",
            category=CATEGORY,
            description="Takes metadata apart: prompt, workflow, facts about the file and everything else, as JSON.",
            inputs=[
                MetadataRaw.Input("metadata_raw", tooltip="From Load Image with Metadata or another metadata node.")
            ],
            outputs=[
                json_output("prompt", PROMPT_TOOLTIP),
                json_output("workflow", WORKFLOW_TOOLTIP),
                json_output("fileinfo", FILEINFO_TOOLTIP),
                json_output("extra", "All other texts in the file by name, as JSON: author, EXIF, comments, XMP."),
                json_output("raw_to_json", "All of the above in one JSON object."),
            ],
        )

    @classmethod
    def execute(cls, metadata_raw: Metadata) -> io.NodeOutput:
        check_metadata(metadata_raw=metadata_raw)
        found = metadata_raw.as_dict()
        return io.NodeOutput(*(dump(found[part]) for part in PARTS), dump(found))


class MetadataComparatorTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MetadataComparatorTPU",
            display_name="Metadata Comparator (TPU)",
            category=CATEGORY,
            description="Shows what differs between the metadata of two files: what was added, removed or changed, and "
            "where.",
            inputs=[
                MetadataRaw.Input("metadata_raw_old", tooltip="The one to start from."),
                MetadataRaw.Input("metadata_raw_new", tooltip="The one to compare with it."),
                io.Combo.Input(
                    "what",
                    options=[*PARTS, EVERYTHING],
                    default=PARTS[0],
                    tooltip="Which part to compare. Workflows also differ in positions and sizes, prompts do not.",
                ),
            ],
            outputs=[json_output("difference", "A line for each difference: + added, - removed, ~ changed.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, metadata_raw_old: Metadata, metadata_raw_new: Metadata, what: str) -> io.NodeOutput:
        check_choice("what", what, (*PARTS, EVERYTHING))
        check_metadata(metadata_raw_old=metadata_raw_old, metadata_raw_new=metadata_raw_new)
        old, new = metadata_raw_old.as_dict(), metadata_raw_new.as_dict()
        text = describe(compare(old, new) if what == EVERYTHING else compare(old[what], new[what]))
        return io.NodeOutput(text, ui={"text": [text]})


class ImageResolutionTPU(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="ImageResolutionTPU",
            display_name="Image Resolution (TPU)",
            category=CATEGORY,
            description="Tells how wide and high pictures are, and how many there are.",
            inputs=[io.Image.Input("image", tooltip="A picture, or a batch of pictures or frames.")],
            outputs=[
                io.Int.Output("width", display_name="width", tooltip="Width in pixels."),
                io.Int.Output("height", display_name="height", tooltip="Height in pixels."),
                io.Int.Output("count", display_name="count", tooltip="Number of pictures in the batch."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, image) -> io.NodeOutput:
        count, height, width = image.shape[:3]
        text = f"{width} × {height}" + (f", {count} pictures" if count > 1 else "")
        return io.NodeOutput(width, height, count, ui={"text": [text]})


NODES = [
    LoadImageWithMetadataTPU,
    SaveImageWithMetadataTPU,
    PreviewFromImageTPU,
    MetadataExtractorTPU,
    MetadataComparatorTPU,
    ImageResolutionTPU,
]
