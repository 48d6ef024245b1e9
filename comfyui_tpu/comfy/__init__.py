"""Everything that touches ComfyUI's modules: progress, previews, Cancel, core's types, models, unloading."""
