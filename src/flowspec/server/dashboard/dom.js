// Elements and figures. Text always goes through textContent: what a model writes is never read as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with properties (`class`, `data-*`, `aria-*` and `role` as attributes) and children. */
export function element(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Set a text or an attribute only where it differs, so that screen readers and the layout rest. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
}

/** Make `parent` hold exactly `nodes`, in order; what stays keeps its place, and so its focus. */
export function keep(parent, nodes) {
  const wanted = new Set(nodes);
  for (const node of [...parent.children]) if (!wanted.has(node)) node.remove();
  nodes.forEach((node, i) => {
    if (parent.children[i] !== node) parent.insertBefore(node, parent.children[i] ?? null);
  });
}

/** A request's id, cut to what tells it from others. */
export const brief = (id) => (id.length > 16 ? `…${id.slice(-8)}` : id);

export const decimal = (value, digits = 1) => (value == null ? "–" : value.toFixed(digits));

export const percent = (share) => (share == null ? "–" : `${Math.round(100 * share)} %`);

export function bytes(count) {
  if (count == null) return "–";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (count >= 1000 && unit < units.length - 1) {
    count /= 1024;
    unit += 1;
  }
  return `${count.toFixed(unit && count < 10 ? 1 : 0)} ${units[unit]}`;
}
