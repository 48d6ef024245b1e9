"""Everything that touches ComfyUI's modules: progress, previews, Cancel, core's types, model lookup, the unload hook."""
