// Shows a node's text on the node: Show Any, the comparators and the other output nodes under TPU/Monitor.
//
// ComfyUI draws pictures of any node by itself, but texts only of its own "Preview as Text".
import { app } from "../../scripts/app.js";

const CATEGORY = "TPU/Monitor/";
const WIDGET = "shown_text";
const MIN_WIDTH = 260;
const MIN_HEIGHT = 100;
const PICTURE_HEIGHT = 220; // what the frontend gives a picture under the widgets

function createBox() {
  const box = document.createElement("textarea");
  box.className = "comfy-multiline-input";
  box.readOnly = true;
  box.spellcheck = false;
  // Frontend 1.32's "Nodes 2.0" leaves an element at its own size.
  Object.assign(box.style, { width: "100%", height: "100%", minHeight: "60px", boxSizing: "border-box", resize: "none" });
  return box;
}

function textWidget(node, pictureHeight) {
  const found = node.widgets?.find((widget) => widget.name === WIDGET);
  if (found) return found;
  const box = createBox();
  const widget = node.addDOMWidget(WIDGET, WIDGET, box, {
    serialize: false, // not part of the prompt
    hideOnZoom: true,
    getValue: () => box.value,
    setValue: (text) => {
      box.value = text;
    },
    getMinHeight: () => MIN_HEIGHT,
  });
  widget.serialize = false; // nor of the saved workflow
  const [width, height] = node.computeSize();
  node.setSize([Math.max(node.size[0], width, MIN_WIDTH), Math.max(node.size[1], height + pictureHeight)]);
  return widget;
}

function showText(node, output) {
  const text = output?.text;
  if (!Array.isArray(text)) return;
  textWidget(node, output.images?.length ? PICTURE_HEIGHT : 0).value = text.join("\n");
  node.setDirtyCanvas?.(true, true);
}

app.registerExtension({
  name: "ComfyUI-TPU.NodeTexts",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.output_node || !nodeData.category?.startsWith(CATEGORY)) return;
    const onExecuted = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      onExecuted?.apply(this, arguments);
      showText(this, output);
    };
  },
});
