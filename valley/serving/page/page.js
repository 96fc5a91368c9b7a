// The chat page: shows a video or image to the model, asks about it, and shows the answer as it is written.
// What comes from the model, from files' names or from the server is put into the page as text, never as markup.

const LARGEST_BYTES = 64 * 2 ** 20; // what a server takes unless told otherwise; it decides, this saves the upload
const STILL_TYPES = ["image/jpeg", "image/png", "image/webp", "image/bmp", "image/x-ms-bmp"];
const VIDEO_NAMES = /\.(mp4|m4v|mov|webm|mkv|avi|flv|ts|m2ts|mpe?g|wmv|asf|3gp|gif)$/i;
const STILL_NAMES = /\.(jpe?g|png|webp|bmp)$/i;
const CARDS_WITH_PICTURE = 12;
const KEY = "valley-api-key";
const READY = "Now ask what you want to know.";

const page = Object.fromEntries([...document.querySelectorAll("[id]")].map((element) => [element.id, element]));

const INVITATION = page["hero-text"].textContent;

/** One video or image: a file (`blob`), a bundled clip (`blob` and `clip`) or an address (`link`). */
class Medium {
  constructor({ kind, name, blob = null, clip = null, link = null }) {
    Object.assign(this, { kind, name, blob, clip, link });
    this.previewUrl = blob && URL.createObjectURL(blob);
    this.player = null; // the <video>, as long as the browser can play it
    this.shownTimes = ""; // of the frames that the conversation shows already
    this.element = mediumElement(this);
  }

  forget() {
    if (this.previewUrl) URL.revokeObjectURL(this.previewUrl);
  }
}

class ApiError extends Error {
  constructor(status, { message, code = "", param = "" }, retryAfter = null) {
    super(message);
    Object.assign(this, { status, code: code ?? "", param: param ?? "", retryAfter });
  }
}

class InterruptedError extends Error {}

const state = {
  model: "",
  turns: [], // {question, medium, text, finish, usage, seen, clock, request, parts}
  medium: null, // goes with the next question
  running: null, // AbortController of the answer that is being written
  follows: true, // the end of the conversation is kept in sight
  scrollY: 0,
};

// ---- the page's elements ------------------------------------------------------------------------------------------

function h(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function button(text, onclick, className = "quiet small") {
  return h("button", { type: "button", textContent: text, className, onclick });
}

function seconds(value) {
  return `${value.toFixed(value < 10 ? 2 : 1)} s`;
}

function clockTime(time_s) {
  if (time_s < 60) return `${Number(time_s.toFixed(2))} s`;
  const rest = Number((time_s % 60).toFixed(1));
  return `${Math.floor(time_s / 60)}:${rest < 10 ? "0" : ""}${rest}`;
}

function size(bytes) {
  if (bytes < 1e3) return `${bytes} bytes`;
  return bytes < 1e6 ? `${Math.round(bytes / 1e3)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

function say(text) {
  page.status.textContent = text;
}

function focusQuestion() {
  if (!matchMedia("(pointer: coarse)").matches) page.question.focus(); // there it would open the keyboard
}

function showProblem(text, { retry = false } = {}) {
  const again = retry ? button("Try again", () => page.composer.requestSubmit()) : null;
  page.problem.replaceChildren(h("p", { textContent: text }), ...(again ? [again] : []));
  page.problem.hidden = false;
}

function clearProblem() {
  page.problem.hidden = true;
  page.problem.replaceChildren();
  page["key-problem"].hidden = true;
}

function follow() {
  if (state.follows) scrollTo(0, document.documentElement.scrollHeight);
}

/** Who scrolls up wants to read; who scrolls down to the end wants to see it grow. */
function onScroll() {
  if (scrollY < state.scrollY) state.follows = false;
  if (innerHeight + scrollY >= document.documentElement.scrollHeight - 40) state.follows = true;
  state.scrollY = scrollY;
}

// ---- media --------------------------------------------------------------------------------------------------------

function mediumElement(medium) {
  const detail = medium.blob ? size(medium.blob.size) : "fetched by the server";
  const caption = h("figcaption", {}, h("span", { className: "name", textContent: medium.name }));
  caption.append(h("span", { className: "detail", textContent: detail }));
  const figure = h("figure", { className: "medium" }, medium.previewUrl ? preview(medium) : null, caption);
  return figure;
}

function preview(medium) {
  const isStill = medium.kind === "image" || medium.blob.type === "image/gif";
  const element = isStill
    ? h("img", { alt: `Preview of ${medium.name}` })
    : h("video", { controls: true, muted: true, playsInline: true, preload: "metadata" });
  const giveUp = () => {
    medium.player = null;
    const text = "No preview: this browser cannot show it. What the model sees is shown with the answer.";
    element.replaceWith(h("p", { className: "no-preview", textContent: text }));
  };
  element.addEventListener("error", giveUp);
  if (!isStill) {
    element.setAttribute("aria-label", `Video ${medium.name}`);
    element.addEventListener("loadedmetadata", () => {
      if (element.videoWidth) element.style.setProperty("--ratio", element.videoWidth / element.videoHeight);
      else giveUp();
    });
    medium.player = element;
  }
  element.src = medium.previewUrl;
  return element;
}

/** Returns what is wrong with a file as far as a browser can tell; empty: nothing. */
function fileProblem(file) {
  const isKnown = file.type.startsWith("video/") || kindOf(file) === "image" || VIDEO_NAMES.test(file.name);
  if (!isKnown) return `“${file.name}” is neither a video nor an image that the model reads (JPEG, PNG, WebP, GIF, BMP).`;
  if (file.size === 0) return `“${file.name}” is empty.`;
  if (file.size > LARGEST_BYTES) return `“${file.name}” has ${size(file.size)}; the most is ${size(LARGEST_BYTES)}.`;
  return "";
}

/** A GIF is a video: it may move. */
function kindOf(file) {
  return STILL_TYPES.includes(file.type) || (!file.type && STILL_NAMES.test(file.name)) ? "image" : "video";
}

function attach(medium) {
  if (state.medium && state.medium !== medium) state.medium.forget();
  state.medium = medium;
  const remove = medium && button("Remove", () => (attach(null), focusQuestion()));
  page.attached.replaceChildren(...(medium ? [medium.element, remove] : []));
  page.attached.hidden = !medium;
  page.drop.hidden = Boolean(medium);
  page["hero-text"].textContent = medium ? READY : INVITATION;
  if (medium) {
    toggle("link", false);
    toggle("clips", false);
    say(`${medium.name} is attached`);
    focusQuestion();
  }
}

function attachFile(file, clip = null) {
  clearProblem();
  const problem = fileProblem(file);
  if (problem) showProblem(problem);
  else attach(new Medium({ kind: kindOf(file), name: file.name, blob: file, clip }));
}

function attachLink(text) {
  clearProblem();
  const url = URL.canParse(text) ? new URL(text) : null;
  if (url?.protocol !== "https:") {
    showProblem("A link has to begin with https://");
    return;
  }
  const kind = STILL_NAMES.test(url.pathname) ? "image" : "video";
  page.link.value = "";
  attach(new Medium({ kind, name: url.href, link: url.href }));
}

async function attachClip(name) {
  clearProblem();
  try {
    const blob = await (await call(clipPath(name))).blob();
    attachFile(new File([blob], name, { type: blob.type }), name);
  } catch (error) {
    showProblem(explain(error), { retry: false });
  }
}

function clipPath(name) {
  return `clips/${encodeURIComponent(name)}`;
}

function clipCard(name, number) {
  const isStill = STILL_NAMES.test(name) || /\.gif$/i.test(name);
  const picture = isStill
    ? h("img", { alt: "", loading: "lazy" })
    : h("video", { muted: true, playsInline: true, preload: "metadata", tabIndex: -1 });
  picture.addEventListener("error", () => picture.remove());
  if (number < CARDS_WITH_PICTURE) picture.src = isStill ? clipPath(name) : `${clipPath(name)}#t=0.1`;
  const label = h("span", { className: "name", textContent: name });
  const card = h("button", { type: "button", className: "clip", onclick: () => attachClip(name) });
  card.append(h("span", { className: "clip-picture" }, picture), label);
  return h("li", {}, card);
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onerror = () => reject(new InterruptedError("The file cannot be read any more. Choose it again."));
    reader.onload = () => resolve(dataHead(blob) + reader.result.slice(reader.result.indexOf(",") + 1));
    reader.readAsDataURL(blob);
  });
}

/** Browsers' names of types may have parameters that say nothing here. */
function dataHead(blob) {
  return `data:${/^(video|image)\/[a-z0-9.+-]+/i.exec(blob.type)?.[0] ?? "application/octet-stream"};base64,`;
}

// ---- the API ------------------------------------------------------------------------------------------------------

function authorization() {
  const key = page.key.value.trim();
  return key ? { headers: { authorization: `Bearer ${key}` }, credentials: "omit" } : { headers: {} };
}

/** Returns a response that is no error. Without a key of its own the browser sends what it logged in with. */
async function call(path, { body, signal } = {}) {
  const { headers, ...rest } = authorization();
  if (body) headers["content-type"] = "application/json";
  const response = await fetch(path, { method: body ? "POST" : "GET", headers, body, signal, ...rest });
  if (!response.ok) throw await errorOf(response);
  return response;
}

async function errorOf(response) {
  const told = await response.json().catch(() => null);
  const error = told?.error ?? { message: `The server answered ${response.status}.` };
  return new ApiError(response.status, error, response.headers.get("retry-after"));
}

/** Yields the JSON of server-sent events up to `[DONE]`; a stream that ends before it was interrupted. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new InterruptedError("The connection ended before the answer did.");
      const blocks = (rest + value).split(/\r?\n\r?\n/);
      rest = blocks.pop();
      for (const block of blocks) {
        const data = block.replace(/^data: ?/gm, "");
        if (data === "[DONE]") return;
        if (!block.startsWith(":")) yield JSON.parse(data); // others are comments that keep a connection open
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // it failed already
  }
}

/** Returns the body of a request; media stand in it as they are, to be written as `urlOf` says. */
function requestFor(question, medium, turns) {
  const system = page.system.value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const turn of turns) {
    messages.push(userMessage(turn.question, turn.medium), { role: "assistant", content: turn.text });
  }
  messages.push(userMessage(question, medium));
  const stream = { stream: true, stream_options: { include_usage: true }, return_frames: true };
  return { model: state.model, messages, ...decoding(), ...stream };
}

function userMessage(question, medium) {
  if (!medium) return { role: "user", content: question };
  const type = `${medium.kind}_url`;
  return { role: "user", content: [{ type, [type]: { url: medium } }, { type: "text", text: question }] };
}

function decoding() {
  const options = {};
  if (page.temperature.value) options.temperature = page.temperature.valueAsNumber;
  if (page["max-tokens"].value) options.max_tokens = page["max-tokens"].valueAsNumber;
  if (page.sampling.value) options[page.sampling.value] = page.frames.valueAsNumber;
  return options;
}

function mediaOf(request) {
  const parts = request.messages.flatMap(({ content }) => (Array.isArray(content) ? content : []));
  return parts.filter(({ type }) => type !== "text").map((part) => part[part.type].url);
}

async function written(request) {
  const urls = new Map();
  for (const medium of mediaOf(request)) urls.set(medium, medium.link ?? (await dataUrl(medium.blob)));
  return JSON.stringify(request, (_, value) => urls.get(value) ?? value);
}

// ---- the same request in a shell ----------------------------------------------------------------------------------

function quoted(text) {
  return `'${text.replaceAll("'", "'\\''")}'`;
}

/** Returns a command for bash. A file goes through a pipe: as an argument it would be too long. */
function curlCommand(request) {
  const media = mediaOf(request);
  const mark = (medium) => medium.link ?? `${dataHead(medium.blob)}\0${media.indexOf(medium)}\0`;
  const text = JSON.stringify(request, (_, value) => (value instanceof Medium ? mark(value) : value), 2);
  const pieces = text.split(/\\u0000(\d+)\\u0000/);
  const lines = pieces.map((piece, number) => (number % 2 ? base64Command(media[piece]) : `printf %s ${quoted(piece)}`));
  const target = quoted(new URL("v1/chat/completions", location.href).href);
  const options = `-H 'Content-Type: application/json'${keyOption()} --data-binary @-`;
  return `{ ${lines.join("\n  ")}\n} | curl -N ${target} ${options}\n`;
}

function base64Command(medium) {
  const read = medium.clip
    ? `curl -fsS ${quoted(new URL(clipPath(medium.clip), location.href).href)}${keyOption()} | base64`
    : `base64 < ${quoted(medium.name)}`;
  return `${read} | tr -d '\\n'`;
}

function keyOption() {
  return page.key.value ? ' -H "Authorization: Bearer $VALLEY_API_KEY"' : "";
}

async function copy(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    copyByHand(text); // no clipboard for pages without TLS
    from.focus();
  }
  const label = from.textContent;
  from.textContent = "Copied";
  say("Copied");
  setTimeout(() => (from.textContent = label), 1500);
}

function copyByHand(text) {
  const area = h("textarea", { value: text, className: "hidden" });
  document.body.append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}

// ---- a conversation -----------------------------------------------------------------------------------------------

async function ask(question, medium) {
  clearProblem();
  document.querySelectorAll(".retry").forEach((element) => element.remove());
  const turn = newTurn(question, medium);
  const control = new AbortController();
  setRunning(control);
  const failure = await receive(turn, control.signal).then(() => null, (error) => error);
  if (state.running === control) setRunning(null);
  if (!state.turns.includes(turn)) return; // a new conversation has begun
  settle(turn, failure, control.signal.aborted);
}

function newTurn(question, medium) {
  const busy = medium ? `Looking at the ${medium.kind}…` : "Thinking…";
  const parts = {
    element: h("article", { className: "turn" }),
    seen: h("div", { className: "seen" }),
    busy: h("p", { className: "busy", textContent: busy }),
    text: document.createTextNode(""),
    answer: h("div", { className: "answer", ariaBusy: "true" }),
    foot: h("div", { className: "foot" }),
  };
  parts.answer.append(parts.text);
  parts.element.append(h("div", { className: "question" }, medium?.element ?? null, h("p", { textContent: question })));
  parts.element.append(parts.seen, parts.busy, parts.answer, parts.foot);
  const turn = { question, medium, text: "", finish: null, usage: null, seen: null, clock: {}, request: null, parts };
  state.turns.push(turn);
  page.log.append(parts.element);
  page.hero.hidden = true;
  toggle("clips", false);
  say(busy);
  state.follows = true;
  follow();
  return turn;
}

async function receive(turn, signal) {
  if (!state.model) await loadModel();
  turn.request = requestFor(turn.question, turn.medium, state.turns.slice(0, state.turns.indexOf(turn)));
  const body = await written(turn.request);
  signal.throwIfAborted();
  turn.clock.sent = performance.now();
  const response = await call("v1/chat/completions", { body, signal });
  for await (const event of events(response.body)) take(turn, event);
}

function take(turn, event) {
  if (event.error) throw new ApiError(0, event.error);
  if (event.valley) showSeen(turn, event.valley);
  turn.usage = event.usage ?? turn.usage;
  const choice = event.choices?.[0];
  turn.finish = choice?.finish_reason ?? turn.finish;
  if (!choice?.delta?.content) return;
  turn.clock.first ??= performance.now();
  turn.clock.last = performance.now();
  turn.text += choice.delta.content;
  turn.clock.painting ??= requestAnimationFrame(() => paint(turn));
}

function paint(turn) {
  turn.clock.painting = null;
  turn.parts.busy.remove();
  turn.parts.text.appendData(turn.text.slice(turn.parts.text.length));
}

/** Ends a turn. What has a text stays, also if it is not all of it; else the question goes back to where it was. */
function settle(turn, failure, isStopped) {
  paint(turn);
  turn.parts.answer.ariaBusy = "false";
  if (failure && !turn.text) {
    takeBack(turn);
    if (isStopped) say("Stopped");
    else tell(failure, turn);
    return;
  }
  if (!turn.text) turn.parts.answer.append(h("em", { textContent: "The model had nothing to say." }));
  turn.parts.foot.append(figures(turn, isStopped), actions(turn));
  if (failure && !isStopped) turn.parts.foot.prepend(interruption(turn, failure));
  say(isStopped ? "Stopped" : failure ? "" : "The answer is complete");
}

function takeBack(turn) {
  remove(turn);
  if (!page.question.value) page.question.value = turn.question;
  if (turn.medium && !state.medium) attach(turn.medium);
  grow();
}

function remove(turn) {
  state.turns.splice(state.turns.indexOf(turn), 1);
  turn.parts.element.remove();
  if (turn.request) mediaOf(turn.request).forEach((medium) => (medium.shownTimes = ""));
  page.hero.hidden = state.turns.length > 0;
}

function tell(failure, turn) {
  const isLatest = turn.medium && mediumAt(failure.param, turn.request) === turn.medium;
  const isUnusable = isLatest && [400, 413, 415, 422].includes(failure.status);
  if (isUnusable && state.medium === turn.medium) detach();
  showProblem(explain(failure, turn.request), { retry: !isUnusable });
  if (failure.status === 401) askForKey();
  else focusQuestion();
}

/** Takes an unusable medium away; a link stays to be corrected. */
function detach() {
  const { link } = state.medium;
  attach(null);
  toggle("link", Boolean(link));
  page.link.value = link ?? "";
}

function interruption(turn, failure) {
  const retry = button("Try again", () => {
    if (state.running) return;
    remove(turn);
    ask(turn.question, turn.medium);
  }, "quiet small retry");
  const text = h("p", { textContent: `The answer was interrupted. ${explain(failure, turn.request)}` });
  const alert = h("div", { className: "problem" }, text, retry);
  alert.setAttribute("role", "alert");
  return alert;
}

/** Returns the medium that the API's name of a place, such as `messages[0].content[1]`, stands for. */
function mediumAt(param, request) {
  const place = /^messages\[(\d+)\]\.content\[(\d+)\]/.exec(param ?? "");
  const part = place && request?.messages[place[1]]?.content[place[2]];
  return part?.[part.type]?.url ?? null;
}

/** Returns what people are told of an error. */
function explain(failure, request = null) {
  if (failure instanceof InterruptedError) return failure.message;
  if (!(failure instanceof ApiError)) return "The server cannot be reached, or it ended the connection.";
  if (failure.status === 401) return keyProblem();
  const medium = mediumAt(failure.param, request);
  const message = medium ? failure.message.replace(failure.param, `“${medium.name}”`) : failure.message;
  const wait = failure.retryAfter ? ` Try again in ${failure.retryAfter} s.` : "";
  const text = message.charAt(0).toUpperCase() + message.slice(1);
  return `${/[.!?…]$/.test(text) ? text : `${text}.`}${wait}`;
}

function keyProblem() {
  return page.key.value.trim() ? "The server does not accept this API key." : "The server wants an API key.";
}

function askForKey() {
  page["key-problem"].textContent = keyProblem();
  page["key-problem"].hidden = false;
  page.settings.open = true;
  page.key.focus();
}

// ---- what is told of an answer ------------------------------------------------------------------------------------

function showSeen(turn, seen) {
  turn.seen = seen;
  mediaOf(turn.request).forEach((medium, number) => {
    const { times_s, frames } = seen.media[number] ?? {};
    const times = JSON.stringify(times_s);
    if (!frames?.length || times === medium.shownTimes) return;
    medium.shownTimes = times;
    turn.parts.seen.append(strip(medium, times_s, frames));
  });
}

function strip(medium, times_s, frames) {
  const count = `What the model saw: ${frames.length === 1 ? "one frame" : `${frames.length} frames`}`;
  const list = h("ol", { className: "frames", ariaLabel: count });
  list.append(...frames.map((frame, number) => h("li", {}, frameElement(medium, frame, times_s[number]))));
  if (medium.player) list.addEventListener("keydown", moveAlong);
  else list.tabIndex = 0; // so that it can be scrolled by keyboard
  (list.querySelector("button") ?? {}).tabIndex = 0;
  const hint = medium.player ? h("span", { className: "hint", textContent: "press one to jump there" }) : null;
  return h("section", { className: "strip" }, h("p", { className: "note" }, count, hint), list);
}

/** A frame leads to its place in the player, where there is one. */
function frameElement(medium, frame, time_s) {
  const isStill = medium.kind === "image";
  const label = isStill ? "the image" : clockTime(time_s);
  const element = medium.player ? h("button", { type: "button", tabIndex: -1 }) : h("div");
  element.className = "frame";
  element.append(h("img", { src: frame, alt: isStill ? "The image" : `Frame at ${label}` }));
  element.append(isStill ? "" : h("span", { className: "time", textContent: label, ariaHidden: "true" }));
  element.addEventListener("click", () => {
    if (!medium.player) return;
    medium.player.currentTime = time_s;
    medium.player.scrollIntoView({ block: "nearest" });
  });
  return element;
}

/** One of the frames takes part in the order of tabs; the arrows lead to the others. */
function moveAlong(event) {
  const frames = [...event.currentTarget.querySelectorAll("button")];
  const here = frames.indexOf(event.target);
  const there = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: frames.length - 1 }[event.key];
  if (here < 0 || !frames[there]) return;
  event.preventDefault();
  frames[here].tabIndex = -1;
  frames[there].tabIndex = 0;
  frames[there].focus();
}

function figures(turn, isStopped) {
  const { clock, usage, seen } = turn;
  const told = [];
  if (clock.first) told.push(["first token", seconds((clock.first - clock.sent) / 1e3)]);
  if (usage?.completion_tokens > 1 && clock.last > clock.first) {
    const perSecond = ((usage.completion_tokens - 1) * 1e3) / (clock.last - clock.first);
    told.push(["speed", `${perSecond.toFixed(perSecond < 10 ? 1 : 0)} tokens/s`]);
  }
  if (usage) told.push(["length", `${usage.completion_tokens} tokens`]);
  if (seen?.media.length) told.push(["looking", lookingFigure(seen)]);
  if (isStopped) told.push(["ended", "stopped"]);
  else if (turn.finish === "length") told.push(["ended", "at the limit of tokens"]);
  const items = told.map(([name, value]) => h("div", { className: name.replace(" ", "-") }, h("dt", {}, name), h("dd", {}, value)));
  return h("dl", { className: "figures", ariaLabel: "Figures" }, ...items);
}

function lookingFigure({ media, known, decode_s, encode_s }) {
  return known >= media.length ? "known already" : seconds(decode_s + encode_s);
}

function actions(turn) {
  const copyAnswer = button("Copy", () => copy(turn.text, copyAnswer));
  const copyCurl = button("Copy as curl", () => copy(curlCommand(turn.request), copyCurl));
  copyAnswer.title = "Copy the answer";
  copyCurl.title = "Copy a command that sends the same request";
  return h("div", { className: "actions" }, copyAnswer, copyCurl);
}

// ---- what one does ------------------------------------------------------------------------------------------------

function submit() {
  const question = page.question.value.trim();
  if (state.running || !settingsAreRight()) return;
  if (!question) {
    page.question.focus();
    return;
  }
  const medium = state.medium;
  state.medium = null; // it belongs to the turn from now on
  attach(null);
  page.question.value = "";
  grow();
  ask(question, medium);
  focusQuestion();
}

function stop() {
  state.running?.abort();
  focusQuestion();
}

function setRunning(control) {
  const hadFocus = document.activeElement === page.stop;
  state.running = control;
  page.send.hidden = Boolean(control);
  page.stop.hidden = !control;
  if (hadFocus || (!control && document.activeElement === document.body)) focusQuestion();
}

function startAnew() {
  const turns = state.turns;
  state.turns = [];
  state.running?.abort();
  attach(null);
  turns.forEach((turn) => turn.medium?.forget());
  page.log.replaceChildren();
  page.hero.hidden = false;
  page.question.value = "";
  grow();
  clearProblem();
  toggle("clips", page.clips.childElementCount > 0);
  say("A new conversation");
  page.question.focus();
}

function settingsAreRight() {
  if (page["settings-form"].checkValidity()) return true;
  page.settings.open = true;
  page["settings-form"].reportValidity();
  return false;
}

function chooseSampling() {
  const isNumber = page.sampling.value === "num_frames";
  page.frames.disabled = !page.sampling.value;
  page.frames.required = Boolean(page.sampling.value);
  page.frames.min = isNumber ? "1" : "0.01";
  page.frames.step = isNumber ? "1" : "any";
}

function keepKey() {
  sessionStorage.setItem(KEY, page.key.value.trim());
  clearProblem();
}

/** Shows or hides what belongs to the button `<name>-toggle`. */
function toggle(name, isOpen) {
  const panel = name === "link" ? page["link-row"] : page["clips-panel"];
  panel.hidden = !isOpen;
  page[`${name}-toggle`].ariaExpanded = String(isOpen);
}

function grow() {
  page.question.style.height = "auto";
  page.question.style.height = `${page.question.scrollHeight}px`;
}

function onKey(event) {
  if (event.key !== "Escape") return;
  if (page.settings.open) {
    page.settings.open = false;
    page.settings.querySelector("summary").focus();
  } else if (!page["link-row"].hidden) {
    toggle("link", false);
    page["link-toggle"].focus();
  } else if (state.running) {
    stop();
  }
}

function onEnter(element, act) {
  element.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    act();
  });
}

function onPaste(event) {
  const [file] = event.clipboardData.files;
  if (!file) return;
  event.preventDefault();
  attachFile(file);
}

function onDrop(event) {
  event.preventDefault();
  page.dropping.hidden = true;
  const [file] = event.dataTransfer.files;
  const link = event.dataTransfer.getData("text/uri-list").split("\n")[0];
  if (file) attachFile(file);
  else if (link) attachLink(link.trim());
}

function onDrag(event) {
  if (!event.dataTransfer.types.some((type) => type === "Files" || type === "text/uri-list")) return;
  event.preventDefault();
  page.dropping.hidden = false;
}

function listen() {
  page.composer.addEventListener("submit", (event) => (event.preventDefault(), submit()));
  page["settings-form"].addEventListener("submit", (event) => event.preventDefault());
  page.question.addEventListener("input", grow);
  onEnter(page.question, () => page.composer.requestSubmit());
  onEnter(page.link, () => attachLink(page.link.value.trim()));
  page["link-add"].addEventListener("click", () => attachLink(page.link.value.trim()));
  for (const opener of [page.choose, page.drop]) opener.addEventListener("click", () => page.file.click());
  page.file.addEventListener("change", () => {
    if (page.file.files[0]) attachFile(page.file.files[0]);
    page.file.value = ""; // so that the same file can be chosen again
  });
  page["link-toggle"].addEventListener("click", () => {
    toggle("link", page["link-row"].hidden);
    page.link.focus();
  });
  page["clips-toggle"].addEventListener("click", () => toggle("clips", page["clips-panel"].hidden));
  page.stop.addEventListener("click", stop);
  page.new.addEventListener("click", startAnew);
  page.sampling.addEventListener("change", chooseSampling);
  page.key.addEventListener("input", keepKey);
  document.addEventListener("keydown", onKey);
  document.addEventListener("paste", onPaste);
  document.addEventListener("click", (event) => page.settings.contains(event.target) || (page.settings.open = false));
  document.addEventListener("dragover", onDrag);
  document.addEventListener("dragleave", (event) => event.relatedTarget || (page.dropping.hidden = true));
  document.addEventListener("drop", onDrop);
  document.addEventListener("scroll", onScroll, { passive: true });
  new ResizeObserver(follow).observe(page.log);
}

async function loadModel() {
  const { data } = await (await call("v1/models")).json();
  state.model = data[0].id;
  page.model.textContent = state.model;
  page.model.hidden = false;
}

async function loadClips() {
  const { clips } = await (await call("clips")).json();
  page.clips.replaceChildren(...clips.map(clipCard));
  page["clips-toggle"].hidden = clips.length === 0;
  toggle("clips", clips.length > 0 && state.turns.length === 0 && !state.medium);
}

page.key.value = sessionStorage.getItem(KEY) ?? "";
listen();
chooseSampling();
grow();
focusQuestion();
loadModel().catch((error) => showProblem(explain(error)));
loadClips().catch(() => {}); // the page is complete without them
