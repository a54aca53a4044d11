// What has happened, newest first.

import { byId, make } from "./dom.js";
import { clock, moment } from "./format.js";
import { t } from "./i18n.js";

const KEPT = 200;
const SICK = new Set(["down", "ejected"]);

/** The router's text ends with the reason in parentheses, if there is one. */
function words(event) {
  if (event.kind === "state") {
    const head = `${event.server}: ${event.old} → ${event.new} (`;
    const why = event.text.startsWith(head) ? event.text.slice(head.length, -1) : "";
    return t(why ? "eventStateWhy" : "eventState", {
      server: event.server, old: t(`state_${event.old}`), new: t(`state_${event.new}`), reason: why,
    });
  }
  if (event.kind === "full") {
    const times = Number(/full (\d+) times/.exec(event.text)?.[1] ?? 1);
    return t("eventFull", { server: event.server, n: times });
  }
  if (event.kind === "drained") return t("eventDrained", { server: event.server });
  if (event.kind === "reload") return t("eventReload", { text: event.text });
  if (event.kind === "discovery") return t("eventDiscovery", { text: event.text });
  if (event.kind === "reload_refused") return t("eventRefused", { text: event.text });
  return event.text;
}

function mood(event) {
  if (event.kind === "state") {
    if (SICK.has(event.new)) return "bad";
    return event.new === "up" ? "good" : "some";
  }
  return { reload: "good", discovery: "good", source: "some", full: "some", drained: "some", missed: "some" }[event.kind] ?? "bad";
}

export class Events {
  constructor() {
    this.list = byId("events");
    this.events = [];
  }

  /** The hello's: those known already are not shown twice. */
  hello(events, started) {
    // Numbers start again with the router.
    if (started !== this.started) this.newest = 0;
    this.started = started;
    for (const event of events) this.add(event);
  }

  add(event) {
    if (event.id !== 0) {
      if (event.id <= this.newest) return;
      this.newest = event.id;
    }
    this.events.unshift(event);
    this.list.prepend(this.item(event));
    if (this.events.length > KEPT) {
      this.events.pop();
      this.list.lastElementChild.remove();
    }
    byId("no-events").hidden = true;
  }

  item(event) {
    return make("li", { "data-mood": mood(event), "data-kind": event.kind },
      make("time", { datetime: new Date(event.time * 1000).toISOString(), title: moment(event.time) },
        clock(event.time)),
      make("span", {}, words(event)));
  }

  words() {
    this.list.replaceChildren(...this.events.map((event) => this.item(event)));
  }
}
