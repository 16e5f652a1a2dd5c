// The conversation as it is shown: a view a turn, and what can be done with the last one.

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
let live = null; // tokens a second of the answer that comes

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
