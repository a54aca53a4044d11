// Small helpers. Everything from outside reaches the page as text, never as markup.

/** An element with attributes and children; strings become text. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : value);
    }
  }
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/**
 * A setter that touches the page only when the value is another one: at 100 servers and two
 * snapshots a second, nearly all of them are not.
 */
export function memo(write) {
  let last;
  return (value) => {
    if (value !== last) {
      last = value;
      write(value);
    }
  };
}

/** The text node is kept: a new one for each change would be a hundred a second to collect. */
export function textOf(node) {
  const text = document.createTextNode(node.textContent);
  node.replaceChildren(text);
  return memo((value) => { text.data = value; });
}

export const attributeOf = (node, name) =>
  memo((value) => (value === null ? node.removeAttribute(name) : node.setAttribute(name, value)));

export const styleOf = (node, property) =>
  memo((value) => node.style.setProperty(property, value));

export const shownIf = (node) => memo((value) => { node.hidden = !value; });

export function stored(key) {
  try {
    return localStorage.getItem(`vllm-router.${key}`);
  } catch {
    return null; // storage is forbidden here
  }
}

export function store(key, value) {
  try {
    localStorage.setItem(`vllm-router.${key}`, value);
  } catch {
    // It holds until the page is left.
  }
}

/**
 * Append a cell per column to a row, and return the cells by column.
 *
 * The cell of the column `header` names the row. `contents` are the nodes of each cell; the cell of a
 * figure gets a node for its value. `set` gets the writers: of values by column, of labels as `…Label`.
 */
export function appendCells(root, columns, { header, prefix, contents, set }) {
  const cells = {};
  for (const { id, figure } of columns) {
    const names = id === header;
    const cell = make(names ? "th" : "td", {
      class: `${prefix}-${id}${figure ? " figure" : ""}`,
      role: names ? "rowheader" : "cell", scope: names ? "row" : null,
    }, ...contents[id]);
    set[`${id}Label`] = attributeOf(cell, "data-label");
    if (figure) {
      const value = make("span", { class: "value" });
      cell.append(value);
      set[id] = textOf(value);
    }
    cells[id] = cell;
    root.append(cell);
  }
  return cells;
}
