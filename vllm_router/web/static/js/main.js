// Puts the page together: messages come in, the parts show them.

import { attributeOf, byId, make, textOf } from "./dom.js";
import { Charts } from "./charts.js";
import { Columns } from "./columns.js";
import { fromAddress, toAddress } from "./address.js";
import { Decisions } from "./decisions.js";
import { Confirm } from "./dialogs.js";
import { Events } from "./events.js";
import { Explain } from "./explain.js";
import { Feed } from "./feed.js";
import { megabytes, percent, seconds, span } from "./format.js";
import { History } from "./history.js";
import { languageKey, preferred, t, use } from "./i18n.js";
import { KeyDialog, signIn } from "./key.js";
import { Keys } from "./keys.js";
import { Models } from "./models.js";
import { placeMenu } from "./menus.js";
import { outageText } from "./outage.js";
import { Panel } from "./panel.js";
import { doubtText } from "./reasons.js";
import { Routers } from "./routers.js";
import { Sources } from "./sources.js";
import { Table } from "./table.js";
import { Tiles } from "./tiles.js";

const SCHEMA = 1;
const SICK = new Set(["down", "ejected"]);
const SAY_EVERY = 5000;

const history = new History();
let hello = null;
let snapshot = null;
let link = { state: "connecting", age: null };
let firstVersion = null;

use(preferred());
byId("language").value = languageKey();

const tiles = new Tiles();
const charts = new Charts(history);
const events = new Events();
const confirm = new Confirm((text) => say(text));
const panel = new Panel(
  (server, action) => confirm.ask(server, action),
  (name, most) => events.of(name, most),
);
const decisions = new Decisions();
const explain = new Explain();
const keys = new KeyDialog(() => feed.again(), () => showLink());
const table = new Table(
  (server, action) => confirm.ask(server, action),
  (server) => panel.open(server),
);

const columns = new Columns(() => remeasure());
placeMenu("settings-menu", "settings");

const chosenModel = byId("model-filter");
const models = new Models((name) => {
  const model = snapshot?.models?.find((one) => one.name === name);
  chosenModel.hidden = model === undefined;
  chosenModel.textContent = model ? t("modelChip", { model: name }) : "";
  table.selectModel(model ? [model.name, ...model.names] : null);
});
chosenModel.addEventListener("click", () => models.choose(models.chosen));
const sources = new Sources();
const routers = new Routers();
const clientKeys = new Keys();

// -- views --------------------------------------------------------------------------------------

const VIEWS = ["fleet", "decisions", "explain"];
let view = VIEWS.includes(fromAddress("view")) ? fromAddress("view") : "fleet";

function showView(next) {
  view = next;
  toAddress("view", view === "fleet" ? "" : view);
  for (const button of document.querySelectorAll("[data-view]")) {
    button.setAttribute("aria-pressed", String(button.dataset.view === view));
  }
  document.body.dataset.shown = view;
  byId("view-decisions").hidden = view !== "decisions";
  byId("view-explain").hidden = view !== "explain";
  decisions.show(view === "decisions");
  explain.show(view === "explain");
  clientKeys.show(view === "fleet");
  if (view === "fleet") remeasure();
}
for (const button of document.querySelectorAll("[data-view]")) {
  button.addEventListener("click", () => showView(button.dataset.view));
}

// -- what is said aloud ------------------------------------------------------------------------

const say = textOf(byId("announce"));
let saidAt = 0;
let trouble = [];

/** Only what an operator must hear, and several things at one moment in one sentence. */
function sayTrouble(event) {
  if (!["state", "states"].includes(event.kind) || !SICK.has(event.new)) return;
  trouble.push(event);
  if (trouble.length > 1) return;
  setTimeout(() => {
    const [first] = trouble;
    const number = trouble.reduce((sum, { count }) => sum + (count ?? 1), 0);
    say(number === 1
      ? t("saidState", { server: first.server, state: t(`state_${first.new}`) })
      : t("saidStates", { n: number }));
    trouble = [];
    saidAt = performance.now();
  }, Math.max(300, saidAt + SAY_EVERY - performance.now()));
}

// -- the line at the top, banners, the line at the bottom ---------------------------------------

const linkState = attributeOf(byId("link"), "data-link");
const linkText = textOf(byId("link-text"));
const pageStale = attributeOf(document.documentElement, "data-stale");

function showLink() {
  const { state, age } = link;
  const draining = state === "live" && snapshot?.router.draining;
  linkState(draining ? "draining" : state);
  pageStale(state === "live" || state === "connecting" ? null : "");
  const values = { age: span(age ?? 0) };
  const refused = state === "connecting" && keys.declined;
  linkText(draining ? t("linkDraining") : refused ? t("linkKey") : t({
    connecting: "linkConnecting", live: "linkLive", stale: "linkStale", lost: "linkLost",
  }[state], values));
}

let banners = "";
let originRefused = "";

function showBanners() {
  const wanted = [];
  const reload = snapshot?.router.reload;
  if (hello && hello.schema > SCHEMA) wanted.push({ text: t("bannerSchema"), again: true });
  else if (hello && hello.version !== firstVersion) {
    wanted.push({ text: t("bannerVersion", { version: hello.version }), again: true });
  }
  if (originRefused) wanted.push({ text: t("bannerOrigin"), more: originRefused, bad: true });
  if (reload?.error) wanted.push({ text: t("bannerReload"), more: reload.error, bad: true });
  for (const source of snapshot?.router.sources ?? []) {
    if (source.problem) {
      wanted.push({ text: t("bannerSource"), more: `${source.name} (${source.place}): ${source.problem}`, bad: true });
    }
    if (source.doubt) wanted.push({ text: t("bannerDoubt"), more: `${source.name}: ${doubtText(source)}` });
  }
  const shared = snapshot?.router.shared;
  if (shared?.problem) {
    wanted.push({ text: t("bannerShared"), more: `${shared.store}: ${shared.problem}`, bad: true });
  }
  const differing = shared?.routers.filter(({ live, same_configuration: same }) => live && !same) ?? [];
  if (differing.length > 0) {
    wanted.push({ text: t("bannerDiffers"), more: differing.map(({ name }) => name).join(", ") });
  }
  const outage = snapshot ? outageText(snapshot) : "";
  if (outage) wanted.unshift({ text: outage, bad: true });
  if (snapshot?.router.unused && !snapshot.router.draining) wanted.push(firstRequest(snapshot));
  if (snapshot?.router.draining) wanted.push({ text: t("bannerDraining") });
  const key = JSON.stringify(wanted);
  if (key === banners) return;
  banners = key;
  byId("banners").replaceChildren(...wanted.map(({ text, more, again, bad, copy }) => {
    const mood = copy ? "hint" : bad ? "bad" : "some";
    const banner = make("div", { class: "banner", "data-mood": mood }, make("p", {}, text));
    if (again) {
      const button = make("button", { type: "button" }, t("reloadPage"));
      button.addEventListener("click", () => location.reload());
      banner.append(button);
    }
    if (copy) banner.append(copyButton(more));
    if (more) banner.append(make("pre", {}, more));
    return banner;
  }));
}

/** Until the first request of a client: a command that sends one to this page's router. */
function firstRequest({ servers }) {
  const model = servers.flatMap(({ models }) => models ?? [])[0] ?? "MODEL";
  const body = JSON.stringify({ model, stream: true, messages: [{ role: "user", content: "Hello!" }] });
  const base = new URL(".", location.href).href.replace(/\/$/, "");
  const quoted = body.replaceAll("'", "'\\''");
  const more = `curl -N ${base}/v1/chat/completions -H 'Content-Type: application/json' -d '${quoted}'`;
  return { text: t("bannerFirst"), more, copy: true };
}

function copyButton(text) {
  const button = make("button", { type: "button" }, t("copy"));
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = t("copied");
    } catch {
      // Pages of plain HTTP on another machine have no clipboard: select the text instead.
      getSelection().selectAllChildren(button.parentElement.querySelector("pre"));
    }
  });
  return button;
}

const FACTS = [
  ["factPolicy", () => hello.config.policy],
  ["factConfig", ({ reload }) => (reload.source === null
    ? t("factCommandLine")
    : t("factGeneration", { source: reload.source, n: reload.generation }))],
  ["factSources", ({ sources }) => (sources?.length
    ? t("factSourcesGood", { n: sources.filter(({ problem, age }) => !problem && age !== null).length, all: sources.length })
    : t("factNoSources"))],
  ["factRouters", ({ shared }) => (shared
    ? t(shared.up ? "factRoutersShare" : "factRoutersAlone", {
      n: 1 + shared.routers.filter(({ live }) => live).length, elsewhere: shared.in_flight,
    })
    : t("factNoSources"))],
  ["factUptime", (router) => span(router.uptime)],
  ["factCpu", (router) => percent(router.cpu)],
  ["factMemory", (router) => megabytes(router.rss_bytes)],
  ["factLag", (router) => seconds(router.event_loop_lag)],
  ["factClients", (router) => String(router.feed_clients)],
  ["factVersion", () => hello.version],
];
const facts = FACTS.map(([key, read]) => {
  const [name, value] = [make("span"), make("b")];
  byId("facts").append(make("span", { class: "fact" }, name, " ", value));
  return { key, read, name: textOf(name), value: textOf(value) };
});

function showFacts() {
  for (const { key, read, name, value } of facts) {
    name(t(key));
    value(hello && snapshot ? read(snapshot.router) : "–");
  }
}

// -- messages -----------------------------------------------------------------------------------

let newRow = false;
let asked = false;
const work = { draws: 0, milliseconds: 0, rows: 0, shown: 0 };

function draw() {
  asked = false;
  if (snapshot === null) return;
  tiles.show(snapshot);
  models.show(snapshot.models ?? []);
  sources.show(snapshot.router.sources ?? []);
  routers.show(snapshot, hello?.version ?? "");
  table.show(snapshot);
  panel.show(snapshot.servers, history, snapshot.time);
  explain.models((snapshot.models ?? []).flatMap(({ name, aliases }) => [name, ...aliases]));
  showFacts();
  showBanners();
  if (newRow) {
    newRow = false;
    tiles.draw(history);
    if (view === "fleet") {
      table.draw(history);
      charts.draw();
    }
    panel.draw();
  }
}

/** At the next frame: a page that nobody sees draws nothing, but keeps its history. */
function drawSoon() {
  if (asked) return;
  asked = true;
  requestAnimationFrame(() => {
    const began = performance.now();
    draw();
    work.draws += 1;
    work.rows = table.written;
    work.shown = snapshot?.time ?? 0;
    work.milliseconds += performance.now() - began;
  });
}

const routerName = textOf(byId("router-name"));
const routerTitle = attributeOf(byId("router-name"), "title");

function showName() {
  routerName(hello ? t("routerOn", { name: hello.name }) : "");
  routerTitle(hello ? t("routerOnTitle") : null);
}

function take(message) {
  if (message.type === "snapshot") {
    snapshot = message;
    newRow = history.snapshot(message) || newRow;
    drawSoon();
  } else if (message.type === "event") {
    events.add(message);
    sayTrouble(message);
  } else if (message.type === "hello") {
    hello = message;
    firstVersion ??= message.version;
    history.hello(message);
    events.hello(message.events, message.started);
    table.allow(message.admin);
    panel.allow(message.admin);
    clientKeys.allow(message.admin);
    keys.offer(!message.admin);
    showName();
    document.title = `${message.name} · vLLM Router`;
    newRow = true;
    document.documentElement.classList.remove("loading");
  }
}

function taken(now) {
  const before = link.state;
  link = now;
  showLink();
  if (before === "live" && now.state === "lost") say(t("saidLost"));
  if ((before === "lost" || before === "stale") && now.state === "live") say(t("saidBack"));
}

byId("language").addEventListener("change", (event) => {
  use(event.target.value, true);
  for (const part of [tiles, charts, events, models, sources, routers, table, columns, clientKeys, panel, decisions, explain]) part.words();
  toAddress("language", languageKey());
  banners = "";
  showLink();
  showName();
  drawSoon();
});

function remeasure() {
  tiles.remeasure();
  table.remeasure();
  newRow = true;
  drawSoon();
}

addEventListener("resize", remeasure);
addEventListener("themechange", remeasure);

showView(view);
showLink();
showFacts();
// For those who look into the page while it runs.
const problem = await signIn();
const feed = new Feed(take, taken, () => keys.refused(), (text) => {
  originRefused = text;
  showBanners();
});
if (problem) keys.open(problem);
// A link that is opened in a tab that shows the page already changes the fragment alone.
addEventListener("hashchange", async () => {
  const result = await signIn();
  if (result) keys.open(result);
  else if (result === "") feed.again();
});
globalThis.vllmRouter = { feed, history, work };
