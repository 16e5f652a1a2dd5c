// Blocks of Markdown: the lines of a text, divided. Every scan is linear in the text, which may be hostile.
"use strict";

// Blocks of Markdown: {kind, lines, …}. `lines` is all of a block's source, so that equal lines are an equal block.
function blocksOf(lines) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const first = at;
    const line = lines[at];
    const fence = fenceOf(line);
    const heading = /^ {0,3}(#{1,6}) +(.*)$/s.exec(line);
    let block;
    if (!line.trim()) {
      at++;
      continue;
    } else if (fence) {
      const closes = (each) => each.startsWith(fence.marks) && !each.replaceAll(fence.marks[0], "");
      for (at++; at < lines.length && !closes(lines[at].trim()); ) at++;
      block = { kind: "code", language: fence.language, body: lines.slice(first + 1, at) };
      at++;
    } else if (heading) {
      at++;
      block = { kind: "heading", level: heading[1].length, text: heading[2].replace(/\s#+\s*$/, "") };
    } else if (isRule(line)) {
      at++;
      block = { kind: "rule" };
    } else if (/^ {0,3}>/.test(line)) {
      while (at < lines.length && lines[at].trim() && (/^ {0,3}>/.test(lines[at]) || !beginsBlock(lines[at]))) at++;
      block = { kind: "quote", body: lines.slice(first, at).map((each) => each.replace(/^ {0,3}> ?/, "")) };
    } else if (itemOf(line)) {
      at = endOfList(lines, at);
      block = { kind: "list", body: lines.slice(first, at) };
    } else if (line.includes("|") && isTableRule(lines[at + 1])) {
      for (at += 2; at < lines.length && lines[at].includes("|") && lines[at].trim(); ) at++;
      block = { kind: "table", rows: [line, ...lines.slice(first + 2, at)] };
    } else {
      for (at++; at < lines.length && lines[at].trim() && !beginsBlock(lines[at]); ) at++;
      block = { kind: "paragraph", body: lines.slice(first, at) };
    }
    block.source = lines.slice(first, at).join("\n");
    blocks.push(block);
  }
  return blocks;
}

// {marks, language} of the line that begins a block of code; null for another line.
function fenceOf(line) {
  const text = line.trim();
  let count = 0;
  while ((text[0] === "`" || text[0] === "~") && text[count] === text[0]) count++;
  const rest = text.slice(count);
  if (count < 3 || /^ {4}/.test(line) || (text[0] === "`" && rest.includes("`"))) return null;
  return { marks: text.slice(0, count), language: rest.trim().split(/\s/)[0] };
}

function isRule(line) {
  const marks = line.replace(/\s/g, "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length) && !/^ {4}/.test(line);
}

function isTableRule(line) {
  return line !== undefined && line.includes("-") && /^[\s|:-]+$/.test(line) && line.includes("|");
}

function beginsBlock(line) {
  return /^ {0,3}(#{1,6} |>|`{3}|~{3})/.test(line) || isRule(line) || itemOf(line) !== null;
}

// {indent, ordered, start, text, width} of the first line of a list's item; null for another line.
function itemOf(line) {
  const found = /^( {0,20})([-*+]|(\d{1,9})[.)])( +|$)(.*)$/s.exec(line);
  if (!found || isRule(line)) return null;
  const width = found[1].length + found[2].length + Math.min(found[4].length || 1, 4);
  return { indent: found[1].length, ordered: found[3] !== undefined, start: Number(found[3]), text: found[5], width };
}

function endOfList(lines, at) {
  const base = itemOf(lines[at]);
  for (at++; at < lines.length; at++) {
    const line = lines[at];
    if (!line.trim()) {
      let next = at + 1;
      while (next < lines.length && !lines[next].trim()) next++;
      const item = next < lines.length ? itemOf(lines[next]) : null;
      const inside = next < lines.length && /^ {2,}/.test(lines[next]) && !/^ *$/.test(lines[next]);
      const goesOn = item ? item.indent > base.indent || item.ordered === base.ordered : inside;
      if (!goesOn) return at;
      at = next - 1;
      continue;
    }
    const item = itemOf(line);
    if (item && item.indent <= base.indent && item.ordered !== base.ordered) return at;
    if (!item && beginsBlock(line) && !/^ {2,}/.test(line)) return at;
  }
  return at;
}
