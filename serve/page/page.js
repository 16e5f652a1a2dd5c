// What the tab remembers, its controls, and the server's state. It comes last: it runs when the page is loaded.

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
