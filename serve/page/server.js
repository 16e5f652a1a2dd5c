// The server's side of the page: its requests, and the stream of an answer.

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
  const body = { model: model.id, messages, stream: true, stream_options: { include_usage: true }, return_token_ids: true };
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
  let tokens = 0;
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
      tokens += choice.token_ids?.length ?? 0;
      if (choice.finish_reason) numbers.finish = choice.finish_reason;
      if (!content && !reasoning) continue;
      const now = performance.now();
      if (first === null) {
        first = now;
        tokens = 0; // the speed is that of those behind the first
      }
      turn.content += content;
      turn.reasoning += reasoning;
      if (tokens > 0) live = tokens / ((now - first) / 1000);
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
