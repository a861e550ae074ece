// The chat page. Nothing is loaded from elsewhere, and text of the model never becomes HTML: every
// element is made by el(), every text by a text node.

const DATABASE = "internvl3";
const SETTINGS_KEY = "internvl3-settings";
const SAVE_EVERY_MS = 700;
const MAX_TITLE = 60;
const MAX_INLINE = 20000;
const BOX_COLORS = ["#b3261e", "#1565c0", "#2e7d32", "#8e24aa", "#a84a00", "#00695c"];
const NUMBER_SETTINGS = ["temperature", "top_p", "max_tokens", "seed", "max_tiles"];
const SPECIAL = /[\\`*_~[h<\n]/;

const $ = (id) => document.getElementById(id);
const state = {
  page: { max_images: 64, max_body_bytes: 64 * 2 ** 20, samples: [] },
  settings: {},
  conversations: [],
  conversation: null,
  attachments: [],
  running: new Map(), // conversation id -> AbortController
  editing: null,
};

/* ---------- Elements ---------- */

function el(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (name === "class") made.className = value;
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("class", "i");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function action(name, label, run) {
  const handle = (event) => run(event.currentTarget);
  return el("button", { type: "button", class: "act", "aria-label": label, title: label, onclick: handle }, icon(name));
}

function announce(text) {
  $("announcer").textContent = text;
}

function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(12)); // randomUUID needs https
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/* ---------- Markdown, as elements ---------- */

const FENCE = /^ {0,3}(```+|~~~+)\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;

/** Split text into blocks: {kind, source, ...}. Equal sources render equally, so they are kept. */
function parseBlocks(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  const take = (kind, end, more = {}) => {
    blocks.push({ kind, source: kind + lines.slice(at, end).join("\n"), ...more });
    at = end;
  };
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) { at += 1; continue; }
    const fence = FENCE.exec(line);
    if (fence) {
      let end = at + 1;
      while (end < lines.length && !lines[end].trim().startsWith(fence[1])) end += 1;
      take("code", Math.min(end + 1, lines.length), { text: lines.slice(at + 1, end).join("\n"), language: fence[2] });
      continue;
    }
    const heading = HEADING.exec(line);
    if (heading) { take("heading", at + 1, { level: heading[1].length, text: heading[2] }); continue; }
    if (RULE.test(line)) { take("rule", at + 1); continue; }
    if (/^ {0,3}>/.test(line)) {
      let end = at;
      while (end < lines.length && /^ {0,3}>/.test(lines[end])) end += 1;
      take("quote", end, { text: lines.slice(at, end).map((one) => one.replace(/^ {0,3}> ?/, "")).join("\n") });
      continue;
    }
    if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && (lines[at + 1] ?? "").includes("-")) {
      let end = at + 2;
      while (end < lines.length && lines[end].includes("|")) end += 1;
      take("table", end, { rows: [lines[at], ...lines.slice(at + 2, end)].map(splitRow) });
      continue;
    }
    if (ITEM.test(line)) { take("list", endOfList(lines, at), { lines: lines.slice(at, endOfList(lines, at)) }); continue; }
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && !startsBlock(lines[end])) end += 1;
    take("paragraph", end, { text: lines.slice(at, end).map((one) => one.trimStart()).join("\n") });
  }
  return blocks;
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || ITEM.test(line) || /^ {0,3}>/.test(line);
}

function endOfList(lines, at) {
  let end = at + 1;
  while (end < lines.length) {
    if (ITEM.test(lines[end]) || /^\s{2,}\S/.test(lines[end])) { end += 1; continue; }
    if (!lines[end].trim() && (ITEM.test(lines[end + 1] ?? "") || /^\s{2,}\S/.test(lines[end + 1] ?? ""))) { end += 1; continue; }
    if (lines[end].trim() && lines[end - 1].trim() && !startsBlock(lines[end])) { end += 1; continue; }
    break;
  }
  return end;
}

function splitRow(line) {
  const cells = line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|");
  return cells.map((cell) => cell.trim());
}

function renderBlock(block, depth = 0) {
  if (depth > 8) return el("p", {}, block.source);
  if (block.kind === "code") return renderCode(block.text, block.language);
  if (block.kind === "heading") return el(`h${Math.min(block.level + 2, 6)}`, {}, renderInline(block.text));
  if (block.kind === "rule") return el("hr");
  if (block.kind === "quote") return el("blockquote", {}, ...parseBlocks(block.text).map((one) => renderBlock(one, depth + 1)));
  if (block.kind === "table") return renderTable(block.rows);
  if (block.kind === "list") return renderList(block.lines, depth);
  return el("p", {}, renderInline(block.text));
}

function renderCode(text, language) {
  const copy = action("copy", "Copy the code", (button) => copyText(text, button));
  return el("div", { class: "code" }, el("pre", { tabindex: "0", "aria-label": language ? `Code in ${language}` : "Code" }, el("code", {}, text)), copy);
}

function renderTable(rows) {
  const cells = (row, tag) => el("tr", {}, ...row.map((cell) => el(tag, tag === "th" ? { scope: "col" } : {}, renderInline(cell))));
  const [head, ...body] = rows;
  return el("div", { class: "table", tabindex: "0" }, el("table", {}, el("thead", {}, cells(head, "th")), el("tbody", {}, ...body.map((row) => cells(row, "td")))));
}

function renderList(lines, depth) {
  const first = ITEM.exec(lines[0]);
  const ordered = /\d/.test(first[2]);
  const list = el(ordered ? "ol" : "ul", ordered && first[2] !== "1." ? { start: parseInt(first[2], 10) } : {});
  const base = first[1].length;
  let item = null;
  const finish = () => {
    if (!item) return;
    const blocks = parseBlocks(item.join("\n"));
    const content = blocks.map((block, n) => (n === 0 && block.kind === "paragraph" ? renderInline(block.text) : renderBlock(block, depth + 1)));
    list.append(el("li", {}, ...content));
  };
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= base + 1) {
      finish();
      item = [found[3]];
    } else item.push(line.replace(/^\s{1,4}/, ""));
  }
  finish();
  return list;
}

const ESCAPED = /^\\([!-/:-@[-`{-~])/;
const LINK = /^\[([^\[\]\n]{1,500})\]\((https?:\/\/[^\s()<>]{1,2000})\)/;
const ADDRESS = /^https?:\/\/[^\s<>"'`]{1,2000}/;
const GROUNDED = /^<ref>([^<]{0,200})<\/ref>\s*<box>\s*\[[\d\s,.[\]]{0,400}\]\s*<\/box>/;
const BARE_BOX = /^<box>\s*\[[\d\s,.[\]]{0,400}\]\s*<\/box>/;
const MARKS = [["**", "strong"], ["__", "strong"], ["~~", "del"], ["*", "em"], ["_", "em"]];

function renderInline(text, depth = 0) {
  const made = document.createDocumentFragment();
  if (text.length > MAX_INLINE || depth > 6) {
    made.append(text);
    return made;
  }
  let plain = "";
  const flush = () => { if (plain) made.append(plain); plain = ""; };
  let at = 0;
  while (at < text.length) {
    if (!SPECIAL.test(text[at])) { plain += text[at]; at += 1; continue; }
    const found = inlineAt(text, at, depth);
    if (!found) { plain += text[at]; at += 1; continue; }
    if (typeof found.node === "string") plain += found.node;
    else { flush(); made.append(found.node); }
    at = found.end;
  }
  flush();
  return made;
}

/** Return what begins at a position: {node, end}, or null for plain text. */
function inlineAt(text, at, depth) {
  const rest = text.slice(at, at + 3000);
  if (text[at] === "\n") return { node: el("br"), end: at + 1 };
  const escaped = ESCAPED.exec(rest);
  if (escaped) return { node: escaped[1], end: at + 2 };
  if (text[at] === "`") {
    const ticks = /^`+/.exec(rest)[0];
    const end = text.indexOf(ticks, at + ticks.length);
    if (end < 0) return null;
    return { node: el("code", {}, text.slice(at + ticks.length, end).trim()), end: end + ticks.length };
  }
  const link = LINK.exec(rest);
  if (link) return { node: linkTo(link[2], renderInline(link[1], depth + 1)), end: at + link[0].length };
  const address = ADDRESS.exec(rest);
  if (address) {
    const url = address[0].replace(/[).,;:!?\]]+$/, "");
    return { node: linkTo(url, url), end: at + url.length };
  }
  const grounded = GROUNDED.exec(rest);
  if (grounded) return { node: el("strong", {}, grounded[1]), end: at + grounded[0].length };
  const box = BARE_BOX.exec(rest);
  if (box) return { node: "", end: at + box[0].length };
  for (const [mark, tag] of MARKS) {
    if (!text.startsWith(mark, at)) continue;
    const start = at + mark.length;
    if (/\s/.test(text[start] ?? " ") || (mark[0] === "_" && /\w/.test(text[at - 1] ?? ""))) continue;
    const end = closingMark(text, start, mark);
    if (end > start) return { node: el(tag, {}, renderInline(text.slice(start, end), depth + 1)), end: end + mark.length };
  }
  return null;
}

function closingMark(text, start, mark) {
  for (let end = text.indexOf(mark, start + 1); end > 0; end = text.indexOf(mark, end + 1)) {
    if (/\s/.test(text[end - 1])) continue;
    if (mark.length === 1 && text[end + 1] === mark) { end += 1; continue; }
    if (mark[0] === "_" && /\w/.test(text[end + mark.length] ?? "")) continue;
    return end;
  }
  return -1;
}

function linkTo(url, content) {
  return el("a", { href: url, target: "_blank", rel: "noopener noreferrer nofollow" }, content);
}

/** Render into an element and keep the blocks that have not changed: streaming stays smooth. */
function renderMarkdown(target, text) {
  const blocks = parseBlocks(text);
  const before = target.sources ?? [];
  let same = 0;
  while (same < blocks.length && before[same] === blocks[same].source) same += 1;
  while (target.children.length > same) target.lastChild.remove();
  for (const block of blocks.slice(same)) target.append(renderBlock(block));
  target.sources = blocks.map((block) => block.source);
}

/* ---------- What is kept in the browser ---------- */

let database = null; // null: nothing can be kept, as in some private windows

function openDatabase() {
  return new Promise((resolve) => {
    let asked;
    try { asked = indexedDB.open(DATABASE, 1); } catch { resolve(null); return; }
    asked.onupgradeneeded = () => {
      asked.result.createObjectStore("conversations", { keyPath: "id" });
      asked.result.createObjectStore("files", { keyPath: "id" });
    };
    asked.onsuccess = () => resolve(asked.result);
    asked.onerror = () => resolve(null);
  });
}

const memory = { conversations: new Map(), files: new Map() };

function stored(store, mode, work) {
  if (!database) return Promise.resolve(undefined);
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(store, mode);
    const asked = work(transaction.objectStore(store));
    transaction.oncomplete = () => resolve(asked?.result);
    transaction.onerror = () => reject(transaction.error);
    transaction.onabort = () => reject(transaction.error);
  });
}

async function put(store, value) {
  memory[store].set(value.id, value);
  try { await stored(store, "readwrite", (one) => one.put(value)); } catch (error) { notice(`This browser keeps no more: ${error?.name ?? "its storage is full"}`); }
}

async function get(store, id) {
  return memory[store].get(id) ?? (await stored(store, "readonly", (one) => one.get(id)));
}

async function remove(store, id) {
  memory[store].delete(id);
  await stored(store, "readwrite", (one) => one.delete(id));
}

async function loadConversations() {
  const all = (await stored("conversations", "readonly", (one) => one.getAll())) ?? [...memory.conversations.values()];
  state.conversations = all.sort((a, b) => b.updated - a.updated);
}

function saveConversation(conversation) {
  conversation.updated = Date.now();
  if (!state.conversations.includes(conversation)) state.conversations.push(conversation);
  state.conversations.sort((a, b) => b.updated - a.updated);
  drawHistory();
  return put("conversations", structuredClone(conversation));
}

async function deleteConversation(conversation) {
  state.running.get(conversation.id)?.abort();
  state.conversations = state.conversations.filter((one) => one !== conversation);
  await remove("conversations", conversation.id);
  const used = new Set(state.conversations.flatMap(filesOf));
  for (const id of filesOf(conversation)) if (!used.has(id)) await remove("files", id);
  if (state.conversation === conversation) newConversation();
  else drawHistory();
}

function filesOf(conversation) {
  return Object.values(conversation.nodes).flatMap((node) => (node.files ?? []).map((file) => file.id));
}

/* ---------- A conversation is a tree: an edit or a retry is a branch ---------- */

function newConversation() {
  state.conversation = { id: newId(), title: "", created: Date.now(), updated: Date.now(), nodes: { root: { id: "root", children: [], active: 0 } } };
  state.editing = null;
  location.hash = "";
  drawConversation();
  drawHistory();
  closeHistoryOnPhone();
  $("question").focus();
}

function openConversation(conversation) {
  state.conversation = conversation;
  state.editing = null;
  location.hash = conversation.id;
  drawConversation();
  drawHistory();
  closeHistoryOnPhone();
  toEnd(true);
}

function addNode(conversation, parentId, node) {
  const parent = conversation.nodes[parentId];
  const made = { id: newId(), parent: parentId, children: [], active: 0, ...node };
  conversation.nodes[made.id] = made;
  parent.children.push(made.id);
  parent.active = parent.children.length - 1;
  return made;
}

/** The nodes that are shown: from the root along the active children. */
function pathOf(conversation) {
  const path = [];
  let node = conversation.nodes.root;
  while (node.children.length) {
    node = conversation.nodes[node.children[node.active]];
    path.push(node);
  }
  return path;
}

function pathTo(conversation, node) {
  const path = [];
  for (let one = node; one.id !== "root"; one = conversation.nodes[one.parent]) path.unshift(one);
  return path;
}

/** Copy the conversation up to a node into a new one. */
async function branchOff(node) {
  const made = { id: newId(), title: state.conversation.title, created: Date.now(), updated: Date.now(), nodes: { root: { id: "root", children: [], active: 0 } } };
  let parent = "root";
  for (const one of pathTo(state.conversation, node)) {
    const { id, parent: _, children, active, ...content } = structuredClone(one);
    parent = addNode(made, parent, content).id;
  }
  await saveConversation(made);
  openConversation(made);
  announce("A new conversation begins here");
}

/* ---------- Files ---------- */

async function attachFiles(list) {
  for (const file of list) {
    if (state.attachments.length >= state.page.max_images) { notice(`At most ${state.page.max_images} files fit into one question.`); break; }
    const kind = kindOf(file);
    if (!kind) { notice(`${file.name || "This file"} is not an image, a video or a PDF.`); continue; }
    const entry = { id: newId(), name: file.name || "image", kind, blob: file };
    if (kind === "image") Object.assign(entry, await measure(file));
    if (entry.width) entry.grid = await askTiles(entry.width, entry.height);
    state.attachments.push(entry);
    announce(`${entry.name} attached`);
  }
  drawAttachments();
  $("question").focus();
}

function kindOf(file) {
  const kind = file.type.split("/")[0];
  if (kind === "image" || kind === "video") return kind;
  if (file.type === "application/pdf") return "pdf";
  return /\.(heic|heif)$/i.test(file.name ?? "") ? "image" : null;
}

async function measure(blob) {
  try {
    const bitmap = await createImageBitmap(blob);
    const size = { width: bitmap.width, height: bitmap.height };
    bitmap.close();
    return size;
  } catch {
    return {}; // a format that this browser does not show; the server may read it
  }
}

async function askTiles(width, height) {
  try {
    const query = new URLSearchParams({ width, height, model: $("model").value });
    if (state.settings.max_tiles) query.set("max_tiles", state.settings.max_tiles);
    const answer = await call(`/chat/tiles?${query}`);
    return answer.ok ? await answer.json() : null;
  } catch {
    return null;
  }
}

function dataURI(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

const urls = new Map(); // file id -> object URL

async function urlOf(file) {
  if (!urls.has(file.id)) {
    const blob = file.blob ?? (await get("files", file.id))?.blob;
    if (!blob) return null;
    urls.set(file.id, URL.createObjectURL(blob));
  }
  return urls.get(file.id);
}

function drawAttachments() {
  const list = $("attachments");
  list.replaceChildren(...state.attachments.map(drawAttachment));
  list.hidden = !state.attachments.length;
  const tiles = state.attachments.reduce((sum, one) => sum + (one.grid?.tiles ?? 0), 0);
  $("attached-size").textContent = tiles ? `${tiles} ${tiles === 1 ? "tile" : "tiles"}` : "";
  drawSend();
}

function drawAttachment(entry) {
  const drop = () => {
    state.attachments = state.attachments.filter((one) => one !== entry);
    drawAttachments();
    announce(`${entry.name} removed`);
    $("question").focus();
  };
  const label = `Remove ${entry.name}`;
  const button = el("button", { type: "button", class: "icon remove", "aria-label": label, onclick: drop }, icon("close"));
  return el("li", {}, pictureOf(entry), button);
}

/** A file as a button that opens it; what the browser cannot show becomes its name. */
function pictureOf(file, boxes = []) {
  if (file.kind !== "image") return el("span", { class: "picture file" }, icon(file.kind === "pdf" ? "page" : "film"), file.name);
  const image = el("img", { alt: file.name, decoding: "async" });
  const frame = el("span", { class: "framed" }, image);
  const button = el("button", { type: "button", class: "picture", "aria-label": `Show ${file.name} large`, onclick: () => openViewer(file, boxes) }, frame);
  const asFile = () => button.replaceWith(el("span", { class: "picture file" }, icon("image"), file.name));
  image.addEventListener("error", asFile);
  urlOf(file).then((url) => (url ? image.setAttribute("src", url) : asFile()));
  if (state.settings.show_tiles && file.grid) frame.append(overlayOf(file, { tiles: true, boxes: [] }));
  if (file.grid) frame.append(el("span", { class: "tile-count", "aria-hidden": "true" }, `${file.grid.tiles} ${file.grid.tiles === 1 ? "tile" : "tiles"}`));
  return button;
}

/* ---------- Tiles and boxes over an image ---------- */

function overlayOf(file, { tiles, boxes }) {
  const layer = el("div", { class: "overlay", "aria-hidden": "true" });
  const place = (node, left, top, width, height) => Object.assign(node.style, { left: `${left}%`, top: `${top}%`, width: `${width}%`, height: `${height}%` });
  if (tiles && file.grid) {
    const { columns, rows } = file.grid;
    for (let n = 0; n < columns * rows; n += 1) {
      const tile = el("div", { class: "tile" });
      place(tile, ((n % columns) * 100) / columns, (Math.floor(n / columns) * 100) / rows, 100 / columns, 100 / rows);
      layer.append(tile);
    }
  }
  const names = [...new Set(boxes.map((box) => box.label))];
  for (const box of boxes) {
    const [x1, y1, x2, y2] = box.relative.map((value) => value / 10);
    const drawn = el("div", { class: y1 < 8 ? "box low" : "box" }, box.label ? el("span", {}, box.label) : null);
    place(drawn, x1, y1, x2 - x1, y2 - y1);
    drawn.style.setProperty("--color", BOX_COLORS[names.indexOf(box.label) % BOX_COLORS.length]);
    layer.append(drawn);
  }
  return layer;
}

function describeFile(file) {
  const parts = [file.name];
  if (file.width) parts.push(`${file.width} × ${file.height}`);
  if (file.grid) {
    const { tiles, columns, rows, thumbnail } = file.grid;
    parts.push(tiles === 1 ? "1 tile" : `${tiles} tiles (${columns} × ${rows}${thumbnail ? " and the whole" : ""})`);
  }
  return parts.join(" · ");
}

async function openViewer(file, boxes) {
  const url = await urlOf(file);
  if (!url) return;
  const frame = el("div", { class: "framed" }, el("img", { src: url, alt: file.name }));
  const draw = () => {
    frame.querySelector(".overlay")?.remove();
    frame.append(overlayOf(file, { tiles: $("viewer-tiles").checked, boxes: $("viewer-boxes").checked ? boxes : [] }));
  };
  $("viewer-caption").textContent = describeFile(file);
  $("viewer-tiles").checked = Boolean(state.settings.show_tiles) || !boxes.length;
  $("viewer-boxes-label").hidden = !boxes.length;
  $("viewer-tiles").onchange = $("viewer-boxes").onchange = draw;
  $("viewer-stage").replaceChildren(frame);
  draw();
  $("viewer").showModal();
}

/* ---------- Drawing ---------- */

const views = new Map(); // node id -> elements of its message

function drawConversation() {
  const before = new Map(views);
  views.clear();
  const path = pathOf(state.conversation);
  const messages = path.map((node, n) => {
    const last = n === path.length - 1;
    const view = before.get(node.id);
    if (view?.state !== stateOf(node, last)) return drawMessage(node, last);
    views.set(node.id, view); // unchanged: its images need not load again
    return view;
  });
  $("messages").replaceChildren(...messages);
  $("welcome").hidden = path.length > 0;
  $("title").textContent = state.conversation.title || "InternVL3";
  document.title = state.conversation.title ? `${state.conversation.title} · InternVL3` : "InternVL3";
  drawSend();
}

/** All that a message's elements are made from, as text. */
function stateOf(node, last) {
  const { children, active } = state.conversation.nodes[node.parent];
  const { text, thinking, running, stopped, error, finish } = node;
  return JSON.stringify([text, thinking, running, stopped, error, finish, children.length, active, last, state.editing === node.id, state.settings.show_tiles]);
}

function drawMessage(node, last) {
  const article = node.role === "user" ? drawQuestion(node) : drawAnswer(node);
  article.state = stateOf(node, last);
  if (last) article.classList.add("last");
  return article;
}

function redraw(node) {
  const view = views.get(node.id);
  if (!view) return;
  const path = pathOf(state.conversation);
  view.replaceWith(drawMessage(node, path[path.length - 1] === node));
}

function drawQuestion(node) {
  const article = el("article", { class: "message user", "aria-label": "Question" });
  views.set(node.id, article);
  if (state.editing === node.id) {
    article.append(drawEditor(node));
    return article;
  }
  if (node.files?.length) article.append(el("div", { class: "pictures" }, ...node.files.map((file) => pictureOf(file))));
  if (node.text) article.append(el("div", { class: "bubble" }, node.text));
  const edit = action("edit", "Edit the question", () => { state.editing = node.id; redraw(node); });
  const copy = action("copy", "Copy the question", (button) => copyText(node.text, button));
  article.append(el("div", { class: "row" }, turnsOf(node), edit, copy));
  return article;
}

function drawEditor(node) {
  const field = el("textarea", { "aria-label": "Edited question" });
  field.value = node.text;
  const cancel = () => { state.editing = null; redraw(node); };
  const send = () => {
    state.editing = null;
    const sibling = addNode(state.conversation, node.parent, { role: "user", text: field.value.trim(), files: node.files });
    drawConversation();
    answer(sibling);
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") { event.stopPropagation(); cancel(); }
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
  });
  requestAnimationFrame(() => field.focus());
  const buttons = [el("button", { type: "button", class: "quiet", onclick: cancel }, "Cancel"), el("button", { type: "button", class: "primary", onclick: send }, "Ask again")];
  return el("div", { class: "editing" }, field, el("div", { class: "row" }, ...buttons));
}

function drawAnswer(node) {
  const article = el("article", { class: "message assistant", "aria-label": "Answer", "aria-busy": node.running ? "true" : null });
  views.set(node.id, article);
  if (node.thinking) article.append(drawThinking(node));
  const body = el("div", { class: "markdown" });
  renderMarkdown(body, node.text ?? "");
  article.append(body);
  if (node.running && !node.text && !node.thinking) article.append(el("div", { class: "waiting", "aria-hidden": "true" }, el("i"), el("i"), el("i")));
  if (node.error) article.append(el("p", { class: "note", role: "alert" }, node.error));
  if (!node.running) {
    const picture = boxedPicture(node);
    if (picture) article.append(picture);
    article.append(drawAnswerRow(node));
  }
  return article;
}

function drawThinking(node) {
  const body = el("div", { class: "markdown" });
  renderMarkdown(body, node.thinking);
  const title = node.running && !node.text ? "Thinking" : "Chain of thought";
  return el("details", { class: "thinking", open: Boolean(node.running && !node.text) }, el("summary", {}, title), body);
}

function drawAnswerRow(node) {
  const row = el("div", { class: "row" }, turnsOf(node));
  row.append(action("copy", "Copy the answer", (button) => copyText(node.text, button)));
  row.append(action("retry", "Answer again", () => retry(node)));
  if ((node.stopped || node.finish === "length") && node.text && !node.thinking) row.append(action("more", "Continue the answer", () => continueAnswer(node)));
  row.append(action("branch", "Branch into a new conversation", () => branchOff(node)));
  const figures = describeFigures(node);
  if (figures) row.append(el("span", { class: "fine" }, figures));
  return row;
}

function describeFigures(node) {
  const parts = [];
  if (node.stopped) parts.push("stopped");
  else if (node.finish === "length") parts.push("cut at the token limit");
  const { usage, timings } = node;
  if (usage) parts.push(`${usage.completion_tokens.toLocaleString("en")} ${usage.completion_tokens === 1 ? "token" : "tokens"}`);
  if (timings?.decode_tps) parts.push(`${timings.decode_tps.toFixed(1)} tok/s`);
  if (usage?.prompt_tokens) {
    const cached = usage.prompt_tokens_details?.cached_tokens;
    parts.push(`prompt ${usage.prompt_tokens.toLocaleString("en")}${cached ? `, ${cached.toLocaleString("en")} cached` : ""}`);
  }
  if (timings?.first_token_s >= 0.05) parts.push(`first after ${timings.first_token_s.toFixed(1)} s`);
  return parts.join(" · ");
}

/** The image of the question with the boxes that the answer names. */
function boxedPicture(node) {
  if (!node.boxes?.length) return null;
  const shown = pathTo(state.conversation, node).flatMap((one) => (one.files ?? []).filter((file) => file.kind === "image"));
  const file = shown[node.boxes[0].image];
  if (!file) return null;
  const frame = el("span", { class: "framed" }, el("img", { alt: `${file.name} with ${node.boxes.length} boxes` }));
  urlOf(file).then((url) => url && frame.firstChild.setAttribute("src", url));
  frame.append(overlayOf(file, { tiles: false, boxes: node.boxes }));
  const labels = node.boxes.map((box) => box.label ?? "a box").join(" ");
  return el("button", { type: "button", class: "answer-picture", "aria-label": `${labels}: show the boxes in ${file.name} large`, onclick: () => openViewer(file, node.boxes) }, frame);
}

/** Arrows between the branches at a message. */
function turnsOf(node) {
  const parent = state.conversation.nodes[node.parent];
  if (parent.children.length < 2) return null;
  const at = parent.children.indexOf(node.id);
  const go = (step) => () => {
    parent.active = (at + step + parent.children.length) % parent.children.length;
    saveConversation(state.conversation);
    drawConversation();
  };
  return el("span", { class: "turns" }, action("left", "Previous version", go(-1)), `${at + 1} of ${parent.children.length}`, action("right", "Next version", go(1)));
}

function drawHistory() {
  const items = state.conversations.map((conversation) => {
    const current = conversation.id === state.conversation?.id;
    const title = conversation.title || "Untitled";
    const open = el("button", { type: "button", class: "open", "aria-current": current ? "true" : null, onclick: () => openConversation(conversation) }, title);
    const drop = el("button", { type: "button", class: "icon remove", "aria-label": `Delete ${title}`, onclick: () => deleteConversation(conversation) }, icon("trash"));
    return el("li", current ? { "data-current": "" } : {}, open, drop);
  });
  $("conversations").replaceChildren(...items);
  $("clear-history").hidden = !items.length;
}

function drawSamples() {
  const ask = (sample) => async () => {
    const blob = await (await fetch(sample.url)).blob();
    await attachFiles([new File([blob], sample.url.split("/").pop(), { type: blob.type })]);
    $("question").value = sample.question;
    submit();
  };
  $("samples").replaceChildren(...state.page.samples.slice(0, 4).map((sample) => el("button", { type: "button", class: "sample", onclick: ask(sample) }, el("img", { src: sample.url, alt: "" }), el("span", {}, sample.question))));
}

function drawSend() {
  const busy = state.running.has(state.conversation?.id);
  $("send").hidden = busy;
  $("stop").hidden = !busy;
  $("send").disabled = !$("question").value.trim() && !state.attachments.length;
}

function notice(text) {
  announce(text);
  const note = el("p", { class: "note", role: "alert" }, text);
  $("messages").append(note);
  setTimeout(() => note.remove(), 9000);
  toEnd();
}

async function copyText(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = el("textarea", { class: "unseen", "aria-hidden": "true" }); // without https
    field.value = text;
    document.body.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
  const before = button.replaceChildren(icon("check"));
  announce("Copied");
  setTimeout(() => button.replaceChildren(icon("copy")), 1200);
  return before;
}

/* ---------- Asking ---------- */

function call(path, options = {}) {
  const headers = { ...options.headers };
  if (state.settings.key) headers.Authorization = `Bearer ${state.settings.key}`;
  return fetch(path, { ...options, headers });
}

async function submit() {
  const text = $("question").value.trim();
  const { conversation, attachments } = state;
  if (state.running.has(conversation.id) || (!text && !attachments.length)) return;
  const size = attachments.reduce((sum, one) => sum + one.blob.size, 0);
  if (size * 1.34 > state.page.max_body_bytes) { notice(`The files are larger than the ${Math.round(state.page.max_body_bytes / 2 ** 20)} MB that the server takes.`); return; }
  const files = attachments.map(({ blob, ...about }) => about);
  for (const { id, blob } of attachments) await put("files", { id, blob });
  const path = pathOf(conversation);
  const parent = path.length ? path[path.length - 1].id : "root";
  const node = addNode(conversation, parent, { role: "user", text, files });
  if (!conversation.title) conversation.title = titleOf(text, files);
  history.replaceState(null, "", `#${conversation.id}`); // a reload finds it again
  state.attachments = [];
  $("question").value = "";
  fitQuestion();
  drawAttachments();
  drawConversation();
  toEnd(true);
  await answer(node);
}

function titleOf(text, files) {
  const title = text.split("\n")[0] || files[0]?.name || "Untitled";
  return title.length > MAX_TITLE ? `${title.slice(0, MAX_TITLE - 1)}…` : title;
}

function retry(node) {
  const question = state.conversation.nodes[node.parent];
  if (!state.running.has(state.conversation.id)) answer(question);
}

function continueAnswer(node) {
  if (!state.running.has(state.conversation.id)) run(node, true);
}

function answer(question) {
  const node = addNode(state.conversation, question.id, { role: "assistant", text: "", thinking: "" });
  return run(node, false);
}

async function run(node, continues) {
  const { conversation } = state;
  const controller = new AbortController();
  state.running.set(conversation.id, controller);
  Object.assign(node, { running: true, stopped: false, error: null, finish: null });
  drawConversation();
  toEnd();
  announce("The answer begins");
  let saved = performance.now();
  const update = () => {
    if (state.conversation === conversation) drawProgress(node);
    if (performance.now() - saved > SAVE_EVERY_MS) { saved = performance.now(); keepUnfinished(conversation, node); }
  };
  try {
    const body = await requestFor(conversation, node, continues);
    await stream(body, controller.signal, node, update);
  } catch (error) {
    if (error.name === "AbortError") node.stopped = true;
    else node.error = error instanceof TypeError ? "The server does not answer. Is it running?" : error.message;
  }
  node.running = false;
  state.running.delete(conversation.id);
  await saveConversation(conversation);
  if (state.conversation === conversation) drawConversation();
  toEnd();
  announce(node.error ? `Error: ${node.error}` : `${node.stopped ? "Stopped" : "Answer"}: ${node.text}`);
}

/** A reload in the middle of an answer finds it as a stopped one. */
function keepUnfinished(conversation, node) {
  const copy = structuredClone(conversation);
  Object.assign(copy.nodes[node.id], { running: false, stopped: true });
  return put("conversations", copy);
}

async function requestFor(conversation, node, continues) {
  const messages = [];
  if (state.settings.system) messages.push({ role: "system", content: state.settings.system });
  for (const one of pathTo(conversation, node)) {
    if (one === node && !continues) break;
    messages.push(one.role === "user" ? await userMessage(one) : { role: "assistant", content: one.text });
  }
  const body = { model: $("model").value, messages, stream: true, stream_options: { include_usage: true }, keep_boxes: true };
  for (const name of NUMBER_SETTINGS) if (state.settings[name] !== undefined) body[name] = state.settings[name];
  const step = state.settings.v2pe_delta;
  if (step) body.v2pe_delta = step === "auto" ? step : Number(step);
  if (state.settings.think) body.think = true;
  if (continues) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  return body;
}

async function userMessage(node) {
  const parts = [];
  for (const file of node.files ?? []) {
    const blob = (await get("files", file.id))?.blob;
    if (!blob) throw new Error(`${file.name} is no longer in this browser; attach it again.`);
    const url = await dataURI(blob);
    if (file.kind === "video") parts.push({ type: "video_url", video_url: { url } });
    else if (file.kind === "pdf") parts.push({ type: "file", file: { filename: file.name, file_data: url } });
    else parts.push({ type: "image_url", image_url: { url } });
  }
  parts.push({ type: "text", text: node.text || "Describe this." });
  return { role: "user", content: parts };
}

async function stream(body, signal, node, update) {
  const response = await call("/v1/chat/completions", { method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
  if (!response.ok) {
    if (response.status === 401) askForKey();
    throw new Error(await errorOf(response));
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    held += value;
    const records = held.split("\n\n");
    held = records.pop();
    for (const record of records) if (readRecord(record, node)) return;
    update();
  }
  throw new Error("The connection ended before the answer did.");
}

/** Take one event of the stream; return true at its end. */
function readRecord(record, node) {
  const line = record.split("\n").find((one) => one.startsWith("data: "));
  if (!line) return false;
  if (line === "data: [DONE]") return true;
  const event = JSON.parse(line.slice(6));
  if (event.error) throw new Error(event.error.message);
  const choice = event.choices?.[0];
  if (choice) {
    node.text += choice.delta.content ?? "";
    node.thinking += choice.delta.reasoning_content ?? "";
    if (choice.finish_reason) node.finish = choice.finish_reason;
    if (choice.boxes) node.boxes = choice.boxes;
  }
  if (event.usage) node.usage = event.usage;
  if (event.timings) node.timings = event.timings;
  return false;
}

async function errorOf(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

let drawn = 0;
let progress = null; // the node that the next frame draws

/** Draw once a frame, however fast the tokens come. */
function drawProgress(node) {
  progress = node;
  drawn ||= requestAnimationFrame(() => {
    drawn = 0;
    const view = views.get(progress.id);
    const body = view?.querySelector(":scope > .markdown");
    if (!body) return;
    view.querySelector(".waiting")?.remove();
    const thinking = view.querySelector(".thinking .markdown");
    if (progress.thinking && !thinking) redraw(progress);
    else if (thinking) renderMarkdown(thinking, progress.thinking);
    if (progress.text && thinking) Object.assign(thinking.parentElement, { open: false });
    renderMarkdown(body, progress.text);
    toEnd();
  });
}

/* ---------- Scrolling ---------- */

const scroller = $("scroller");
let follows = true;

function toEnd(always = false) {
  if (always) follows = true;
  if (follows) scroller.scrollTop = scroller.scrollHeight;
  drawToEnd();
}

function drawToEnd() {
  const below = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  $("to-end").hidden = below < 120;
}

let lastTop = 0;
let gesture = 0; // when the person last did what may scroll
const GESTURE_MS = 1000;

// Content that grows or shrinks moves the end, too: only a person who scrolls up stops following.
for (const kind of ["wheel", "touchmove", "keydown", "pointerdown"]) scroller.addEventListener(kind, () => { gesture = performance.now(); }, { passive: true });
scroller.addEventListener("scroll", () => {
  const top = scroller.scrollTop;
  if (scroller.scrollHeight - top - scroller.clientHeight < 60) follows = true;
  else if (top < lastTop - 2 && performance.now() - gesture < GESTURE_MS) follows = false;
  lastTop = top;
  drawToEnd();
});
new ResizeObserver(() => toEnd()).observe($("messages"));

/* ---------- Settings ---------- */

function loadSettings() {
  try { state.settings = JSON.parse(localStorage.getItem(SETTINGS_KEY)) ?? {}; } catch { state.settings = {}; }
}

function saveSettings() {
  try { localStorage.setItem(SETTINGS_KEY, JSON.stringify(state.settings)); } catch { /* a private window */ }
}

function fillSettings() {
  for (const field of document.querySelectorAll("#settings [id^=set-]")) {
    const value = state.settings[field.id.slice(4)];
    if (field.type === "checkbox") field.checked = Boolean(value);
    else field.value = value ?? "";
  }
}

function takeSetting(field) {
  const name = field.id.slice(4);
  const number = NUMBER_SETTINGS.includes(name);
  const value = field.type === "checkbox" ? field.checked : number && field.value !== "" ? Number(field.value) : field.value.trim();
  if (value === "" || value === false || Number.isNaN(value)) delete state.settings[name];
  else state.settings[name] = value;
  saveSettings();
  applyTheme();
  if (name === "show_tiles") drawConversation();
}

function applyTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  document.documentElement.dataset.theme = state.settings.theme || (dark ? "dark" : "light");
}

function askForKey() {
  fillSettings();
  if (!$("settings").open) $("settings").showModal();
  $("set-key").focus();
}

/* ---------- History panel ---------- */

const isPhone = () => matchMedia("(max-width: 760px)").matches;

function showHistory(open) {
  $("history").hidden = !open;
  $("scrim").hidden = !open || !isPhone();
  $("stage").inert = open && isPhone();
  $("open-history").setAttribute("aria-expanded", String(open));
  state.settings.history_open = open && !isPhone();
  saveSettings();
  if (open) $("new-chat").focus();
  else $("open-history").focus();
}

function closeHistoryOnPhone() {
  if (isPhone() && !$("history").hidden) showHistory(false);
}

/* ---------- Start ---------- */

function fitQuestion() {
  const field = $("question");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
  drawSend();
}

function stop() {
  state.running.get(state.conversation.id)?.abort();
}

function editLastQuestion() {
  const last = pathOf(state.conversation).findLast((node) => node.role === "user");
  if (last && !state.running.has(state.conversation.id)) { state.editing = last.id; redraw(last); }
}

function handleKey(event) {
  if (document.querySelector("dialog[open]")) return;
  const typing = /^(TEXTAREA|INPUT|SELECT)$/.test(event.target.tagName);
  const shortcuts = { KeyN: newConversation, KeyH: () => showHistory($("history").hidden), KeyR: () => { const last = pathOf(state.conversation).at(-1); if (last?.role === "assistant") retry(last); } };
  if (event.altKey && shortcuts[event.code]) { event.preventDefault(); shortcuts[event.code](); return; }
  if (event.key === "Escape") {
    if (isPhone() && !$("history").hidden) showHistory(false);
    else stop();
  } else if (event.key === "/" && !typing) { event.preventDefault(); $("question").focus(); }
}

function listen() {
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  $("question").addEventListener("input", fitQuestion);
  $("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); submit(); }
    if (event.key === "ArrowUp" && !event.target.value) { event.preventDefault(); editLastQuestion(); }
  });
  $("stop").addEventListener("click", stop);
  $("attach").addEventListener("click", () => $("files").click());
  $("photograph").addEventListener("click", () => $("photos").click());
  for (const id of ["files", "photos"]) $(id).addEventListener("change", async (event) => { await attachFiles([...event.target.files]); event.target.value = ""; });
  for (const id of ["new-chat", "quick-new"]) $(id).addEventListener("click", newConversation);
  $("open-history").addEventListener("click", () => showHistory($("history").hidden));
  for (const id of ["close-history", "scrim"]) $(id).addEventListener("click", () => showHistory(false));
  $("clear-history").addEventListener("click", async () => {
    if (!confirm("Delete all conversations of this browser?")) return;
    for (const conversation of [...state.conversations]) await deleteConversation(conversation);
  });
  $("to-end").addEventListener("click", () => toEnd(true));
  $("open-settings").addEventListener("click", () => { fillSettings(); $("settings").showModal(); });
  $("settings").addEventListener("input", (event) => { if (event.target.id.startsWith("set-")) takeSetting(event.target); });
  $("settings").addEventListener("close", start);
  $("reset-settings").addEventListener("click", () => { state.settings = { key: state.settings.key }; saveSettings(); fillSettings(); applyTheme(); });
  $("model").addEventListener("change", () => { state.settings.model = $("model").value; saveSettings(); });
  $("viewer-close").addEventListener("click", () => $("viewer").close());
  $("viewer").addEventListener("click", (event) => { if (event.target === $("viewer")) $("viewer").close(); });
  addEventListener("hashchange", openFromAddress);
  document.addEventListener("keydown", handleKey);
  document.addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) { event.preventDefault(); attachFiles(files); }
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", applyTheme);
  listenForDrops();
}

function listenForDrops() {
  let depth = 0;
  const holdsFiles = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  const show = (change) => (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    depth = Math.max(0, depth + change);
    $("drop").hidden = depth === 0;
  };
  document.addEventListener("dragenter", show(1));
  document.addEventListener("dragleave", show(-1));
  document.addEventListener("dragover", (event) => { if (holdsFiles(event)) event.preventDefault(); });
  document.addEventListener("drop", (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    depth = 0;
    $("drop").hidden = true;
    attachFiles([...event.dataTransfer.files]);
  });
}

/** Ask the server what it serves; done again when the key has changed. */
async function start() {
  try {
    const response = await call("/v1/models");
    if (response.status === 401) { notice("This server needs its key: enter it in the settings."); return; }
    const models = (await response.json()).data;
    $("model").replaceChildren(...models.map((model) => el("option", { value: model.id }, model.display_name)));
    if (models.some((model) => model.id === state.settings.model)) $("model").value = state.settings.model;
    state.page = await (await call("/chat/settings")).json();
    $("set-max_tokens").placeholder = String(state.page.max_tokens);
    drawSamples();
  } catch {
    notice("The server does not answer. Is it running?");
  }
}

/** The address that the server prints for a phone carries its key behind the #. */
function takeKeyFromAddress() {
  const found = /^#key=(.+)$/.exec(location.hash);
  if (!found) return;
  state.settings.key = decodeURIComponent(found[1]);
  saveSettings();
  history.replaceState(null, "", location.pathname);
}

/** Open the conversation that the address names, as after a reload or a step back. */
function openFromAddress() {
  const wanted = location.hash.slice(1);
  if (wanted && wanted === state.conversation?.id) return true;
  const found = state.conversations.find((one) => one.id === wanted);
  if (found) openConversation(found);
  return Boolean(found);
}

loadSettings();
takeKeyFromAddress();
applyTheme();
listen();
database = await openDatabase();
await loadConversations();
if (!openFromAddress()) newConversation();
if (state.settings.history_open && !isPhone()) showHistory(true);
await start();
fitQuestion();
$("question").focus();
document.documentElement.dataset.ready = "true"; // what tests wait for
