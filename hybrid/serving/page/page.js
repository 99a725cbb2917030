"use strict";
const $ = (id) => document.getElementById(id);
const NUMBERS = ["max_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"];
let running = null;
let chosen = null;

function headers() {
  const result = { "content-type": "application/json" };
  if ($("key").value) result.authorization = `Bearer ${$("key").value}`;
  return result;
}

function fail(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

async function connect() {
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      $("key_label").hidden = false;
      $("model").textContent = "this server asks for an API key";
      return;
    }
    const model = (await response.json()).data[0];
    $("model").textContent = `${model.id}, up to ${model.max_length.toLocaleString("en")} tokens`;
    const tokens = $("max_tokens");
    tokens.max = model.max_length;
    // The prompt takes positions, too. What was typed before the server answered stays.
    if (tokens.value === tokens.defaultValue)
      tokens.value = Math.max(1, Math.min(tokens.value, Math.floor(model.max_length / 2)));
  } catch {
    $("model").textContent = "the server does not answer";
  }
}

function settings() {
  const body = { prompt: $("prompt").value, stream: true, logprobs: 5 };
  for (const name of NUMBERS) if ($(name).value !== "") body[name] = Number($(name).value);
  const stop = $("stop").value.replaceAll("\\n", "\n").replaceAll("\\t", "\t");
  if (stop) body.stop = [stop];
  return body;
}

const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;
const shown = (text) => text.replaceAll("\n", "\\n").replaceAll("\t", "\\t").replaceAll(" ", "␣");

// The probabilities that belong to a stretch of text; text can lag behind its tokens, at the bytes of one character.
let pending = [];
function add(choice) {
  const scores = choice.logprobs;
  for (let i = 0; scores && i < scores.tokens.length; i++)
    pending.push({ text: scores.tokens[i], logprob: scores.token_logprobs[i], top: scores.top_logprobs[i] || {} });
  if (!choice.text) return;
  const span = document.createElement("span");
  span.className = "t";
  span.textContent = choice.text;
  span.tokens = pending;
  const logprob = pending.reduce((sum, token) => sum + token.logprob, 0);
  if (pending.length) span.style.setProperty("--rare", (0.45 * (1 - Math.exp(logprob))).toFixed(3));
  pending = [];
  $("output").append(span);
}

function describe(span) {
  chosen?.classList.remove("here");
  chosen = span;
  const box = $("token");
  box.replaceChildren();
  box.hidden = !span?.tokens?.length;
  if (box.hidden) return;
  span.classList.add("here");
  for (const token of span.tokens) {
    const own = document.createElement("b");
    own.textContent = `${shown(token.text)} ${percent(token.logprob)}`;
    box.append(own);
    const likely = Object.entries({ ...token.top, [token.text]: token.logprob }).sort((a, b) => b[1] - a[1]);
    for (const [text, logprob] of likely) box.append(row(text, logprob, text === token.text));
  }
}

function row(text, logprob, own) {
  const line = document.createElement("div");
  line.className = own ? "row own" : "row";
  const [name, bar, share] = ["span", "span", "span"].map((kind) => line.appendChild(document.createElement(kind)));
  name.textContent = shown(text);
  bar.className = "bar";
  bar.append(document.createElement("i"));
  bar.style.setProperty("--share", percent(logprob));
  share.textContent = percent(logprob);
  return line;
}

// The token that ended the text has none of its own.
function end() {
  if (!pending.length) return;
  const span = document.createElement("span");
  span.className = "t end";
  span.textContent = "end";
  span.tokens = pending;
  pending = [];
  $("output").append(span);
}

function clear() {
  $("output").replaceChildren();
  $("speed").textContent = "";
  describe(null);
  fail("");
  pending = [];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) if (part.startsWith("data: ")) yield part.slice(6);
  }
}

async function generate(event) {
  event?.preventDefault();
  if (running || !$("form").reportValidity()) return;
  clear();
  running = new AbortController();
  $("go").disabled = true;
  $("stop_button").disabled = false;
  $("output").classList.add("running");
  const body = settings();
  const prompt = document.createElement("span");
  prompt.className = "prompt";
  prompt.textContent = body.prompt;
  $("output").append(prompt);
  let tokens = 0, first = 0, ended = "", follows = true, paused = performance.now();
  const output = $("output");
  const follow = () => { if (follows) output.scrollTop = output.scrollHeight; };
  // A fast model's tokens would keep the browser from everything else: from drawing, and from the stop button.
  const pause = async () => {
    follow();
    await new Promise((resume) => setTimeout(resume));
    follows = output.scrollTop + output.clientHeight >= output.scrollHeight - 8;
    paused = performance.now();
  };
  const say = (how) => {
    const seconds = (performance.now() - first) / 1000;
    const speed = tokens > 1 && seconds > 0 ? `, ${((tokens - 1) / seconds).toFixed(1)} tokens/s` : "";
    $("speed").textContent = `${tokens} tokens${speed}, ${how || "running"}`;
  };
  try {
    const response = await fetch("v1/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal,
    });
    if (!response.ok) {
      const problem = await response.json().catch(() => null);
      if (response.status === 401) $("key_label").hidden = false;
      throw new Error(problem?.error?.message || `the server answered ${response.status}`);
    }
    for await (const data of events(response)) {
      if (data === "[DONE]") break;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Error(chunk.error.message);
      const choice = chunk.choices[0];
      if (choice.logprobs?.tokens.length) {
        first ||= performance.now();
        tokens += choice.logprobs.tokens.length;
      }
      add(choice);
      if (choice.finish_reason) {
        ended = choice.finish_reason === "length" ? "as many as asked for" : "ended by itself";
        end();
      }
      say();
      if (performance.now() - paused > 30) await pause();
    }
    if (!ended) throw new Error("the server ended the text before it was finished");
  } catch (problem) {
    if (problem.name === "AbortError") {
      ended ||= "stopped";
    } else {
      fail(problem.message);
      ended = "failed";
    }
  }
  say(ended);
  follow();
  $("output").classList.remove("running");
  running = null;
  $("go").disabled = false;
  $("stop_button").disabled = true;
}

const stop = () => running?.abort();
$("form").addEventListener("submit", generate);
$("stop_button").addEventListener("click", stop);
$("clear").addEventListener("click", () => { stop(); clear(); $("prompt").focus(); });
$("key").addEventListener("change", connect);
$("output").addEventListener("pointerover", (event) => {
  if (event.target.classList.contains("t")) describe(event.target);
});
$("output").addEventListener("click", (event) => {
  if (event.target.classList.contains("t")) describe(event.target);
});
$("output").addEventListener("keydown", (event) => {
  const step = { ArrowRight: "nextElementSibling", ArrowLeft: "previousElementSibling" }[event.key];
  if (!step) return;
  const next = chosen ? chosen[step] : $("output").querySelector(".t");
  if (next?.classList.contains("t")) {
    describe(next);
    next.scrollIntoView({ block: "nearest" });
  }
  event.preventDefault();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) generate(event);
  if (event.key === "Escape") stop();
});
if (matchMedia("(max-width: 56rem)").matches) $("settings").open = false;
connect();
