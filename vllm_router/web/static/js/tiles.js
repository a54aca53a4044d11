// The figures that matter most, each with its last five minutes.

import { attributeOf, byId, make, styleOf, textOf } from "./dom.js";
import { NONE, count, latency, megabytes, percent, rate, seconds } from "./format.js";
import { t } from "./i18n.js";
import { heat } from "./load.js";
import { Spark } from "./spark.js";

/** Seconds of event loop lag from which clients notice, and from which an operator must act. */
const LAG_SOME = 0.1;
const LAG_BAD = 0.25;

/** Figures that a line break must not part from their units. */
const whole = (figures) => Object.fromEntries(
  Object.entries(figures).map(([name, text]) => [name, text.replaceAll(" ", "\u00a0")]),
);

const saved = (fleet, text) => (fleet.saved ? t(text, { n: count(fleet.saved) }) : "");

const TILES = [
  {
    id: "requests", title: "tileRequests", figure: "requests_per_s", unit: "perSecond",
    read: ({ fleet }) => ({
      value: rate(fleet.requests_per_s),
      sub: t("subTokens", { n: rate(fleet.tokens_per_s ?? fleet.chunks_per_s) }),
    }),
  },
  {
    id: "streams", title: "tileStreams", figure: "open_streams",
    read: ({ fleet, router }) => ({
      value: count(router.open_streams),
      sub: t(fleet.queued ? "subStreamsQueued" : "subStreams", {
        running: count(fleet.running), waiting: count(fleet.waiting), queued: count(fleet.queued),
      }),
    }),
  },
  {
    id: "ttft", title: "tileTtft", figure: "ttft_p95", area: false,
    read: ({ fleet }) => ({
      value: fleet.ttft ? latency(fleet.ttft.p95) : NONE,
      sub: fleet.ttft
        ? t("subTtft", whole({ p50: latency(fleet.ttft.p50), p99: latency(fleet.ttft.p99) }))
        : t("subNoTtft"),
    }),
  },
  {
    id: "errors", title: "tileErrors", figure: "errors_per_s", unit: "perSecond",
    read: ({ fleet }) => {
      const all = Math.max(fleet.requests_per_s, fleet.errors_per_s);
      const share = fleet.errors_per_s > 0
        ? t("subErrors", { share: percent(fleet.errors_per_s / all) })
        : "";
      return {
        value: rate(fleet.errors_per_s),
        sub: [share, saved(fleet, share ? "subSavedToo" : "subSaved")].filter(Boolean).join(" · ") || t("subNoErrors"),
        mood: fleet.errors_per_s > 0 ? "bad" : "good",
      };
    },
  },
  {
    id: "refused", title: "tileRefused", figure: "refused_per_s", unit: "perSecond",
    read: ({ fleet }) => {
      const reasons = Object.entries(fleet.refused ?? {}).sort(([, one], [, other]) => other - one);
      return {
        value: rate(fleet.refused_per_s),
        sub: reasons.length === 0
          ? t("subNotRefused")
          : reasons.map(([reason, n]) => t(`refused_${reason}`, { n: count(n) })).join(t("listComma")),
        mood: fleet.refused_per_s > 0 ? "some" : "good",
      };
    },
  },
  {
    id: "load", title: "tileLoad", figure: "load", ceiling: 1,
    read: ({ fleet }) => ({
      value: percent(fleet.load),
      sub: t("subLoad", {
        running: count(fleet.running), waiting: count(fleet.waiting), capacity: count(fleet.capacity),
      }),
      mood: heat(fleet.load),
    }),
  },
  {
    id: "available", title: "tileServers", states: true,
    read: ({ fleet }) => {
      const others = Object.entries(fleet.states).filter(([state]) => state !== "up");
      const planned = fleet.states.draining ?? 0;
      return {
        value: `${count(fleet.available)} / ${count(fleet.servers)}`,
        sub: others.length === 0
          ? t("subAllUp")
          : others.map(([state, n]) => `${n} ${t(`state_${state}`)}`).join(t("listComma")),
        // A server that an operator drains is no fault.
        mood: fleet.available + planned < fleet.servers ? "bad" : "good",
      };
    },
  },
  {
    id: "router", title: "tileRouter",
    read: ({ router }) => ({
      value: percent(router.cpu),
      sub: t("subRouter", whole({
        lag: seconds(router.event_loop_lag), memory: megabytes(router.rss_bytes),
      })),
      mood: router.event_loop_lag > LAG_BAD ? "bad" : router.event_loop_lag > LAG_SOME ? "some" : "good",
    }),
  },
];

const STATES = ["up", "full", "refusing", "draining", "asleep", "paused", "unknown", "silent", "ejected", "down"];

/** How many servers are in each state, as one bar. */
class StateBar {
  constructor() {
    this.parts = STATES.map((state) => {
      const root = make("span", { "data-state": state });
      return { state, grow: styleOf(root, "flex-grow"), root };
    });
    this.root = make("span", { class: "statebar", "aria-hidden": "true" }, ...this.parts.map(({ root }) => root));
  }

  show(states) {
    for (const { state, grow } of this.parts) grow(String(states[state] ?? 0));
  }
}

export class Tiles {
  constructor() {
    this.tiles = TILES.map((spec) => {
      const [title, value, unit, sub] = ["h3", "span", "span", "p"].map((tag) => make(tag));
      value.className = "value";
      unit.className = "unit";
      sub.className = "sub";
      const root = make("div", { class: "tile", "data-tile": spec.id },
        title, make("p", { class: "figure" }, value, unit), sub);
      let spark = null;
      let states = null;
      if (spec.figure) {
        const canvas = make("canvas", { class: "spark", "aria-hidden": "true" });
        root.append(canvas);
        spark = new Spark(canvas, { ceiling: spec.ceiling, area: spec.area });
      }
      if (spec.states) {
        states = new StateBar();
        root.append(states.root);
      }
      byId("tiles").append(root);
      return {
        spec, spark, states, title: textOf(title), unit: textOf(unit), value: textOf(value),
        sub: textOf(sub), subTitle: attributeOf(sub, "title"), mood: attributeOf(root, "data-mood"),
      };
    });
    this.words();
  }

  words() {
    for (const { spec, title, unit } of this.tiles) {
      title(t(spec.title));
      unit(spec.unit ? t(spec.unit) : "");
    }
  }

  show(snapshot) {
    for (const tile of this.tiles) {
      const { value, sub, mood } = tile.spec.read(snapshot);
      tile.value(value);
      tile.sub(sub);
      tile.subTitle(sub);
      tile.mood(mood ?? null);
      tile.states?.show(snapshot.fleet.states);
    }
  }

  draw(history) {
    for (const { spec, spark } of this.tiles) spark?.draw(history.recent(spec.figure));
  }

  remeasure() {
    for (const { spark } of this.tiles) spark?.remeasure();
  }
}
