// Elements with text only: nothing a server sends ever becomes markup.

/** <tag class=className>children</tag>; children are elements or texts. */
export function element(tag, className = "", ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

// Writing what is there already would still make the browser lay out and paint again.
export function setText(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

export function setTitle(node, value) {
  if (node.title !== value) node.title = value;
}

/** Fill a bar to `percent` (null: empty) by a transform, which needs no layout. */
export function setFill(node, percent) {
  const value = `scaleX(${((percent ?? 0) / 100).toFixed(3)})`;
  if (node.style.transform !== value) node.style.transform = value;
}
