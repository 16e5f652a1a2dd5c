// Markdown of a model as nodes. Text only ever becomes a text node, so nothing in it is markup; a link leads to http(s)
// and needs a click. Every scan is linear in the text, and depth is limited: the text may be hostile.
const MOST_DEPTH = 6;

function element(name, className, ...children) {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function nodeOf(block, depth) {
  switch (block.kind) {
    case "code": {
      const body = block.body.join("\n");
      const copy = element("button", "", "Copy");
      copy.type = "button";
      copy.addEventListener("click", () => copyText(body, copy));
      const head = element("div", "code-head", element("span", "", block.language.slice(0, 40)), copy);
      return element("div", "code", head, element("pre", "", element("code", "", body)));
    }
    case "heading":
      return inline(element(`h${Math.min(block.level + 2, 6)}`), block.text, 0);
    case "rule":
      return element("hr");
    case "quote":
      return fill(element("blockquote"), block.body, depth + 1);
    case "list":
      return listOf(block.body, depth);
    case "table": {
      const table = element("table");
      block.rows.forEach((row, index) => {
        const cells = row.trim().replace(/^\||\|$/g, "").split("|");
        table.append(element("tr", "", ...cells.map((each) => inline(element(index ? "td" : "th"), each.trim(), 0))));
      });
      return element("div", "table", table);
    }
    default:
      return inline(element("p"), block.body.join("\n"), 0);
  }
}

function listOf(lines, depth) {
  const base = itemOf(lines[0]);
  const list = element(base.ordered ? "ol" : "ul");
  if (base.ordered && base.start !== 1) list.start = base.start;
  let body = null;
  let width = 0;
  const finish = () => {
    if (body) list.append(fill(element("li"), body, depth + 1, true));
  };
  for (const line of lines) {
    const item = itemOf(line);
    if (item && (body === null || item.indent < Math.min(width, base.indent + 2))) {
      finish();
      body = [item.text];
      width = item.width;
    } else {
      const indent = line.length - line.trimStart().length;
      body.push(line.slice(Math.min(indent, width)));
    }
  }
  finish();
  return list;
}

// Fill a node with the blocks of some lines. tight: a paragraph alone needs no element of its own.
function fill(node, lines, depth, tight = false) {
  if (depth > MOST_DEPTH) {
    node.append(lines.join("\n"));
    return node;
  }
  for (const block of blocksOf(lines)) {
    if (tight && block.kind === "paragraph" && !node.childNodes.length) inline(node, block.body.join("\n"), 0);
    else node.append(nodeOf(block, depth));
  }
  return node;
}

const DELIMITERS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

// Fill a node with inline Markdown: code, emphasis, links.
function inline(node, text, depth) {
  const places = new Map(); // of the next closing mark of each kind: what was searched once is not searched again
  const find = (mark, from) => {
    const known = places.get(mark);
    if (known !== undefined && (known < 0 || known >= from)) return known;
    places.set(mark, text.indexOf(mark, from));
    return places.get(mark);
  };
  let plain = "";
  const flush = () => {
    if (plain) node.append(plain);
    plain = "";
  };
  for (let at = 0; at < text.length; ) {
    const here = text[at];
    const mark = DELIMITERS.find(([each]) => text.startsWith(each, at));
    let taken = 0;
    if (here === "\\" && at + 1 < text.length && /[!-/:-@[-`{-~]/.test(text[at + 1])) {
      plain += text[at + 1];
      at += 2;
      continue;
    } else if (here === "`") {
      let count = 1;
      while (text[at + count] === "`") count++;
      const ticks = text.slice(at, at + count);
      const end = count <= 3 ? find(ticks, at + count) : -1;
      if (end > 0) {
        flush();
        node.append(element("code", "", text.slice(at + count, end).replace(/^ (.*) $/s, "$1")));
        taken = end + count - at;
      } else {
        plain += ticks;
        at += count;
        continue;
      }
    } else if (here === "[" || (here === "!" && text[at + 1] === "[")) {
      taken = link(node, text, at, find, flush);
    } else if (here === "h" && /^https?:\/\//.test(text.slice(at, at + 8)) && !/\w/.test(text[at - 1] || "")) {
      let end = at;
      while (end < text.length && end - at < 2000 && !/[\s<>"'`]/.test(text[end])) end++;
      while (/[.,;:!?)\]]/.test(text[end - 1])) end--;
      const made = anchor(text.slice(at, end), text.slice(at, end));
      if (made) {
        flush();
        node.append(made);
        taken = end - at;
      }
    } else if (mark && depth < MOST_DEPTH) {
      const [delimiter, name] = mark;
      const start = at + delimiter.length;
      const insideWord = delimiter[0] === "_" && /\w/.test(text[at - 1] || "");
      const end = insideWord || /\s|^$/.test(text[start] || "") ? -1 : find(delimiter, start + 1);
      if (end > 0 && !/\s/.test(text[end - 1]) && !(delimiter[0] === "_" && /\w/.test(text[end + delimiter.length] || ""))) {
        flush();
        node.append(inline(element(name), text.slice(start, end), depth + 1));
        taken = end + delimiter.length - at;
      } else {
        plain += delimiter;
        at += delimiter.length;
        continue;
      }
    } else if (here === "\n" && (plain.endsWith("  ") || plain.endsWith("\\"))) {
      plain = plain.endsWith("\\") ? plain.slice(0, -1) : plain.trimEnd();
      flush();
      node.append(element("br"));
      taken = 1;
    }
    if (!taken) {
      plain += here;
      taken = 1;
    }
    at += taken;
  }
  flush();
  return node;
}

// Append the link or image at a place, an image as a link; return the length of its source, 0 where there is none.
function link(node, text, at, find, flush) {
  const open = text[at] === "!" ? at + 1 : at;
  const middle = find("](", open);
  if (middle < 0 || middle - open > 1000) return 0;
  const end = find(")", middle);
  if (end < 0 || end - middle > 2000) return 0;
  const label = text.slice(open + 1, middle);
  const made = anchor(text.slice(middle + 2, end).trim().split(/\s/)[0], label);
  if (!made) return 0;
  flush();
  node.append(made);
  return end + 1 - at;
}

function anchor(target, label) {
  let url;
  try {
    url = new URL(target);
  } catch {
    return null;
  }
  if (url.protocol !== "https:" && url.protocol !== "http:") return null;
  const made = element("a", "", label || target);
  made.href = url.href;
  made.rel = "noopener noreferrer";
  made.target = "_blank";
  made.title = url.href;
  return made;
}

// Shows a growing text in a node: blocks that did not change keep their nodes, with the selection in them.
class MarkdownView {
  constructor(node) {
    this.node = node;
    this.sources = [];
  }

  show(text) {
    const blocks = blocksOf(text.split(/\r?\n/));
    let same = 0;
    while (same < blocks.length && this.sources[same] === blocks[same].source) same++;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    for (const block of blocks.slice(same)) this.node.append(nodeOf(block, 0));
    this.sources = blocks.map((block) => block.source);
  }
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Cannot copy"; // browsers allow it on https and localhost alone
  }
  setTimeout(() => (button.textContent = "Copy"), 1500);
}
