// What has happened, newest first.

import { fromAddress, toAddress } from "./address.js";
import { byId, make } from "./dom.js";
import { clock, moment } from "./format.js";
import { t } from "./i18n.js";
import { outcomeText, reasonText, saidText } from "./reasons.js";

const KEPT = 200;
/** Seconds within which equal changes of several servers are one line. */
const TOGETHER = 10;
/** More servers than this are counted. */
const NAMED = 3;
const SICK = new Set(["down", "ejected"]);
/** Events of single requests that are kept: they come in masses, and must not displace all others. */
const KEPT_OF_REQUESTS = 40;

const isChange = ({ kind }) => kind === "state" || kind === "states";
const ofRequest = ({ kind }) => kind === "retries_exhausted";
const serversOf = (event) => (event.servers?.length ? event.servers : [event.server]);
const change = (event) => ({ old: t(`state_${event.old}`), new: t(`state_${event.new}`) });

function words(event) {
  if (event.kind === "state") {
    const reason = reasonText(event);
    return t(reason ? "eventStateWhy" : "eventState", {
      server: event.server, reason, ...change(event),
    });
  }
  if (event.kind === "states") return t("eventStates", { n: event.count ?? "", ...change(event) });
  if (event.kind === "full" && !event.server) {
    return t("eventFullMany", { n: event.servers?.length ?? "", times: event.count ?? "" });
  }
  if (event.kind === "full") return t("eventFull", { server: event.server, n: event.count ?? 1 });
  if (event.kind === "drained") return t("eventDrained", { server: event.server });
  if (event.kind === "missed") return t("eventMissed", { n: event.count ?? "" });
  const text = event.text_code === "changes" ? changes(event.text_values) : saidText(event);
  if (event.kind === "reload") return t("eventReload", { text });
  if (event.kind === "discovery") return t("eventDiscovery", { text });
  if (event.kind === "reload_refused") return t("eventRefused", { text });
  return text;
}

/** What a new configuration changes. */
function changes({ added, removed, details, more }) {
  const parts = [];
  if (Number(added) > 0) parts.push(t("changesAdded", { n: added }));
  if (Number(removed) > 0) parts.push(t("changesRemoved", { n: removed }));
  if (details) parts.push(details);
  if (Number(more) > 0) parts.push(t("changesMore", { n: more }));
  return parts.join(t("listComma")) || t("changesNone");
}

function mood(event) {
  if (isChange(event)) {
    if (SICK.has(event.new)) return "bad";
    // What an operator does is no fault.
    if (event.new === "draining" || event.old === "draining") return "none";
    return event.new === "up" ? "good" : "some";
  }
  return { reload: "good", discovery: "good", source: "some", full: "some", drained: "none", missed: "some" }[event.kind] ?? "bad";
}

/** Whether two events are the same change of several servers, or failed requests, at about the same time. */
const alike = (first, event) => (ofRequest(event) && ofRequest(first) ? event.time - first.time <= TOGETHER
  : isChange(event) && isChange(first)
  && event.old === first.old && event.new === first.new
  && (event.kind === "states" || event.server !== first.server)
  && Math.abs(event.time - first.time) <= TOGETHER);

/** How many requests a group of events is about. */
const requestsOf = (group) => group.reduce(
  (sum, { text_code: code, text_values: values }) => sum + (code === "requests_failed" ? Number(values.n) : 1), 0,
);

/**
 * Make one event of all that no line needs by itself: a group of failed requests lasts as long as they
 * fail, which may be days.
 */
function fold(group) {
  const newest = group.at(-1);
  const last = group.findLast((event) => event !== newest && event.text_code === "request_failed");
  const others = group.filter((event) => event !== newest && event !== last);
  if (others.length < 2) return;
  const sum = { ...others[0], text_code: "requests_failed", text_values: { n: String(requestsOf(others)) } };
  group.splice(0, group.length, sum, ...(last ? [last] : []), newest);
}

export class Events {
  constructor() {
    this.list = byId("events");
    this.events = [];
    /** As they are listed, newest first; the events of a group are oldest first. */
    this.groups = [];
    const troubles = byId("only-trouble");
    troubles.checked = fromAddress("events") === "trouble";
    const follow = () => this.list.toggleAttribute("data-trouble", troubles.checked);
    troubles.addEventListener("change", () => {
      toAddress("events", troubles.checked ? "trouble" : "");
      follow();
    });
    follow();
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
    if (ofRequest(event)) {
      const oldest = this.events.filter(ofRequest)[KEPT_OF_REQUESTS];
      if (oldest) this.events.splice(this.events.lastIndexOf(oldest), 1);
    }
    if (this.events.length > KEPT) this.events.pop();
    const [newest] = this.groups;
    // Failed requests are one line for as long as they go on; of changes the first one counts.
    if (newest && alike(ofRequest(event) ? newest.at(-1) : newest[0], event)) {
      newest.push(event);
      if (ofRequest(event)) fold(newest);
      this.list.firstElementChild.replaceWith(this.groupItem(newest));
    } else {
      this.groups.unshift([event]);
      this.list.prepend(this.item(event));
    }
    if (this.groups.length > KEPT) {
      this.groups.pop();
      this.list.lastElementChild.remove();
    }
    byId("no-events").hidden = true;
  }

  /** The list items of one server's last events, and a key that changes with them. */
  of(server, most) {
    const found = this.events.filter((event) => serversOf(event).includes(server)).slice(0, most)
      .map((event) => (event.kind === "states" ? { ...event, kind: "state", server } : event));
    return { key: `${server} ${found[0]?.id ?? 0}`, items: found.map((event) => this.item(event)) };
  }

  item(event) {
    return make("li", { "data-mood": mood(event), "data-kind": event.kind },
      make("time", { datetime: new Date(event.time * 1000).toISOString(), title: moment(event.time) },
        clock(event.time)),
      make("span", { title: event.text_values?.request ?? event.text }, words(event)));
  }

  /** One line for servers that changed alike at about the same time; the tooltip names them. */
  groupItem(group) {
    if (group.length === 1) return this.item(group[0]);
    if (ofRequest(group[0])) return this.requestsItem(group);
    const item = this.item(group.at(-1));
    const names = [...new Set(group.flatMap(serversOf))];
    const states = change(group[0]);
    const all = names.join(t("listComma"));
    item.lastElementChild.textContent = names.length <= NAMED
      ? t("eventState", { server: all, ...states })
      : t("eventStates", { n: names.length, ...states });
    item.lastElementChild.title = all;
    return item;
  }

  /** One line for requests that failed one after the other: how many, and the last one. */
  requestsItem(group) {
    const last = group.findLast(({ text_code: code }) => code === "request_failed") ?? group.at(-1);
    const { server, n: attempts, why, request } = last.text_values ?? {};
    const item = this.item({ ...group.at(-1), text_values: { request } });
    item.lastElementChild.textContent = t("eventRequestsFailed", {
      n: requestsOf(group), attempts, server, why: outcomeText(why ?? ""),
    });
    return item;
  }

  words() {
    this.list.replaceChildren(...this.groups.map((group) => this.groupItem(group)));
  }
}
