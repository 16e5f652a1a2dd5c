"use strict";

const $ = (selector) => document.querySelector(selector);
const KEPT = "npuq-page"; // of sessionStorage: this tab's own, gone when it is closed
const MOST_KEPT = 2_000_000;

const settings = $("#settings");
const fields = [...settings.querySelectorAll("[name]")];
let turns = []; // {question, content, reasoning, numbers, error}
let model = null;
let running = null; // the AbortController of the answer that comes

// ---- what the tab remembers ----

function keep() {
  const values = Object.fromEntries(fields.map((field) => [field.name, field.value]));
  const text = JSON.stringify({ turns, values, draft: $("#question").value });
  try {
    sessionStorage.setItem(KEPT, text.length > MOST_KEPT ? JSON.stringify({ turns: [], values }) : text);
  } catch {
    // Storage is full or forbidden: the conversation ends with the page.
  }
}

function remember() {
  try {
    const kept = JSON.parse(sessionStorage.getItem(KEPT)) || {};
    for (const field of fields) field.value = kept.values?.[field.name] ?? "";
    turns = Array.isArray(kept.turns) ? kept.turns : [];
    $("#question").value = kept.draft || "";
  } catch {
    turns = [];
  }
}

function setting(name) {
  return fields.find((field) => field.name === name).value;
}

// ---- the server ----

function headers() {
  const key = setting("key").trim();
  return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
}

// The error of a response, in words.
async function refusal(response) {
  let message = "";
  try {
    message = (await response.json()).error.message;
  } catch {
    // No document: the status has to do.
  }
  if (response.status === 401) openSettings("key");
  return new Error(message || `the server answers with status ${response.status}`);
}

async function findModel() {
  const response = await fetch("v1/models", { headers: headers() });
  if (!response.ok) throw await refusal(response);
  model = (await response.json()).data[0];
  $("#model").textContent = model.id;
  document.title = `${model.id} · npuq`;
}

function request() {
  const messages = [];
  const system = setting("system").trim();
  if (system) messages.push({ role: "system", content: system });
  for (const turn of turns) {
    messages.push({ role: "user", content: turn.question });
    if (turn !== turns.at(-1)) messages.push({ role: "assistant", content: turn.content });
  }
  const body = { model: model.id, messages, stream: true, stream_options: { include_usage: true } };
  for (const name of ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"])
    if (setting(name) !== "") body[name] = Number(setting(name));
  const reasoning = setting("reasoning");
  if (reasoning) body.reasoning_effort = reasoning === "on" ? "medium" : "none";
  return body;
}

// The documents of a stream of server-sent events.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Ask the last turn's question, and let its answer come.
async function answer(view) {
  const turn = turns.at(-1);
  const started = performance.now();
  let first = null;
  let chunks = 0;
  running = new AbortController();
  showRunning();
  const numbers = { finish: null };
  try {
    if (!model) await findModel();
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: headers(),
      body: JSON.stringify(request()),
      signal: running.signal,
    });
    if (!response.ok) throw await refusal(response);
    for await (const chunk of eventsOf(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) numbers.usage = chunk.usage;
      const choice = chunk.choices?.[0];
      if (!choice) continue;
      const content = choice.delta?.content || "";
      const reasoning = choice.delta?.reasoning_content ?? choice.delta?.reasoning ?? "";
      if (choice.finish_reason) numbers.finish = choice.finish_reason;
      if (!content && !reasoning) continue;
      const now = performance.now();
      first ??= now;
      turn.content += content;
      turn.reasoning += reasoning;
      chunks++;
      if (chunks > 2) live = chunks / ((now - first) / 1000);
      view.update();
    }
    if (!numbers.finish) throw new Error("the answer broke off");
  } catch (error) {
    if (running.signal.aborted) numbers.finish = "stopped";
    else turn.error = error instanceof TypeError ? "the server cannot be reached" : error.message;
  }
  live = null;
  if (first !== null) {
    numbers.first = (first - started) / 1000;
    numbers.seconds = (performance.now() - first) / 1000;
  }
  turn.numbers = numbers;
  running = null;
  keep();
  view.finish();
  showRunning();
  poll();
}

// ---- the conversation ----

class TurnView {
  constructor(turn) {
    this.turn = turn;
    this.question = element("div", "text", turn.question);
    this.question.dir = "auto";
    this.thought = element("div", "thought");
    this.thought.dir = "auto";
    this.summary = element("summary");
    this.reasoning = element("details", "reasoning", this.summary, this.thought);
    this.reasoning.hidden = true;
    this.text = element("div", "text");
    this.text.dir = "auto";
    this.wait = element("div", "wait", "Reading");
    this.error = element("p", "error");
    this.under = element("div", "under");
    this.markdown = new MarkdownView(this.text);
    this.questionUnder = element("div", "under");
    this.answer = element("div", "turn answer", this.reasoning, this.text, this.wait, this.error, this.under);
    $("#messages").append(element("div", "turn question", this.question, this.questionUnder), this.answer);
    this.wait.hidden = this.error.hidden = true;
    this.due = null;
    this.cost = 0;
  }

  // Draw the answer as far as it came, soon: drawing takes at most a tenth of the time.
  update() {
    this.due ??= setTimeout(() => this.draw(), Math.max(30, 10 * this.cost));
  }

  draw() {
    const started = performance.now();
    const { content, reasoning } = this.turn;
    const comes = running !== null && this.turn === turns.at(-1);
    clearTimeout(this.due);
    this.due = null;
    following(() => {
      this.reasoning.hidden = !reasoning;
      this.thought.textContent = reasoning;
      this.summary.textContent = comes && !content ? "Reasoning…" : "Reasoning";
      this.markdown.show(content);
      this.wait.hidden = !comes || Boolean(content || reasoning);
      this.answer.ariaBusy = String(comes);
    });
    this.cost = performance.now() - started;
  }

  // Draw an answer that is whole, with what can be done about it.
  finish() {
    this.draw();
    const last = this.turn === turns.at(-1) && !running;
    following(() => {
      this.error.hidden = !this.turn.error;
      this.error.textContent = this.turn.error || "";
      const numbers = element("span", "numbers", numbersText(this.turn.numbers));
      numbers.hidden = !numbers.textContent;
      const buttons = [];
      if (this.turn.content) {
        const copy = button("Copy", () => copyText(this.turn.content, copy));
        buttons.push(copy);
      }
      if (last) buttons.push(button(this.turn.error ? "Try again" : "Retry", retry));
      this.under.replaceChildren(...buttons, numbers);
      this.questionUnder.replaceChildren(...(last ? [button("Edit", edit)] : []));
    });
  }
}

let views = [];
let live = null; // tokens a second of the answer that comes, as far as chunks tell

function button(text, action) {
  const made = element("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function numbersText(numbers) {
  if (!numbers) return "";
  const words = [];
  const usage = numbers.usage;
  const count = (value) => value.toLocaleString("en");
  if (usage) {
    const tokens = usage.completion_tokens;
    const thought = usage.completion_tokens_details?.reasoning_tokens;
    words.push(`${count(tokens)} tokens${thought ? ` (${count(thought)} of reasoning)` : ""}`);
    if (numbers.seconds > 0 && tokens > 1) words.push(`${((tokens - 1) / numbers.seconds).toFixed(1)} tokens/s`);
  }
  if (numbers.first !== undefined) words.push(`first after ${numbers.first.toFixed(2)} s`);
  if (usage?.prompt_tokens_details) {
    const cached = usage.prompt_tokens_details.cached_tokens;
    words.push(`${count(cached)} of ${count(usage.prompt_tokens)} prompt tokens from the cache`);
  }
  if (numbers.finish === "length") words.push("cut at its limit of tokens");
  if (numbers.finish === "stopped") words.push("stopped");
  return words.join(" · ");
}

// Change the log; its end stays in view if it was.
function following(change) {
  const log = $("#log");
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function showAll() {
  $("#messages").replaceChildren();
  views = turns.map((turn) => new TurnView(turn));
  for (const view of views) view.finish();
  $("#empty").hidden = turns.length > 0;
  $("#log").scrollTop = $("#log").scrollHeight;
}

function showRunning() {
  const send = $("#send");
  send.textContent = running ? "Stop" : "Send";
  send.classList.toggle("stop", running !== null);
  showStatus();
}

function ask(question) {
  turns.push({ question, content: "", reasoning: "", numbers: null, error: null });
  const view = new TurnView(turns.at(-1));
  views.at(-1)?.finish();
  views.push(view);
  $("#empty").hidden = true;
  const asked = answer(view);
  view.draw();
  $("#log").scrollTop = $("#log").scrollHeight;
  keep();
  return asked;
}

function retry() {
  const { question } = turns.pop();
  showAll();
  ask(question);
}

function edit() {
  $("#question").value = turns.pop().question;
  showAll();
  keep();
  grow();
  $("#question").focus();
}

// ---- controls ----

function submit(event) {
  event?.preventDefault();
  if (running) {
    running.abort();
    return;
  }
  const wrong = fields.find((field) => !field.checkValidity());
  if (wrong) {
    openSettings(wrong.name);
    wrong.reportValidity();
    return;
  }
  const question = $("#question").value;
  if (!question.trim()) return;
  $("#question").value = "";
  grow();
  ask(question);
}

function grow() {
  const area = $("#question");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function openSettings(name) {
  settings.hidden = false;
  $("#toggle").setAttribute("aria-expanded", "true");
  fields.find((field) => field.name === name)?.focus();
}

function closeSettings() {
  settings.hidden = true;
  $("#toggle").setAttribute("aria-expanded", "false");
}

$("#composer").addEventListener("submit", submit);
$("#question").addEventListener("input", () => {
  grow();
  keep();
});
$("#question").addEventListener("keydown", (event) => {
  // A finger has no Shift, and an input method's Enter chooses a character.
  const touch = matchMedia("(pointer: coarse)").matches;
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !touch) {
    event.preventDefault();
    if (!running) submit();
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (running) running.abort();
  else closeSettings();
});
$("#new").addEventListener("click", () => {
  running?.abort();
  turns = [];
  showAll();
  keep();
  $("#question").focus();
});
$("#toggle").addEventListener("click", () => (settings.hidden ? openSettings("system") : closeSettings()));
$("#close").addEventListener("click", closeSettings);
for (const field of fields) field.addEventListener("change", keep);
settings.querySelector("[name=key]").addEventListener("change", () => {
  model = null;
  poll();
});

// ---- the server's state ----

let state = "";

async function poll() {
  if (document.hidden) return;
  try {
    if (!model) await findModel();
    const response = await fetch("metrics", { headers: headers() });
    state = response.ok ? stateText(await response.text()) : "";
  } catch (error) {
    state = error instanceof TypeError ? "The server cannot be reached" : error.message;
  }
  showStatus();
}

function stateText(metrics) {
  const value = (name) => Number(new RegExp(`^npuq_${name}(?:_total)? ([0-9.e+-]+)$`, "m").exec(metrics)?.[1] ?? 0);
  const [busy, waiting] = [value("num_requests_running"), value("num_requests_waiting")];
  const words = [busy + waiting ? `${busy} running${waiting ? `, ${waiting} waiting` : ""}` : "Idle"];
  words.push(`cache ${Math.round(100 * value("kv_cache_usage_perc"))} % full`);
  const read = value("prompt_tokens");
  if (read) words.push(`${Math.round((100 * value("prompt_tokens_cached")) / read)} % of prompts from it`);
  return words.join(" · ");
}

function showStatus() {
  $("#status").textContent = (running && live ? `${live.toFixed(1)} tokens/s · ` : "") + state;
}

setInterval(showStatus, 500);
setInterval(poll, 3000);
document.addEventListener("visibilitychange", poll);

remember();
showAll();
grow();
poll();
