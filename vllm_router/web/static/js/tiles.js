// The figures that matter most, each with its last five minutes.

import { attributeOf, byId, make, textOf } from "./dom.js";
import { NONE, count, percent, rate, seconds } from "./format.js";
import { t } from "./i18n.js";
import { Spark } from "./spark.js";

/** How full a load is, for colours: the same steps as in the terminal. */
export const heat = (load) => (load >= 0.9 ? "high" : load >= 0.7 ? "some" : "low");

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
    id: "ttft", title: "tileTtft", figure: "ttft_p95",
    read: ({ fleet }) => ({
      value: fleet.ttft ? seconds(fleet.ttft.p95) : NONE,
      sub: fleet.ttft
        ? t("subTtft", { p50: seconds(fleet.ttft.p50), p99: seconds(fleet.ttft.p99) })
        : t("subNoTtft"),
    }),
  },
  {
    id: "errors", title: "tileErrors", figure: "errors_per_s", unit: "perSecond",
    read: ({ fleet }) => {
      const all = Math.max(fleet.requests_per_s, fleet.errors_per_s);
      return {
        value: rate(fleet.errors_per_s),
        sub: fleet.errors_per_s > 0
          ? t("subErrors", { share: percent(fleet.errors_per_s / all) })
          : t("subNoErrors"),
        mood: fleet.errors_per_s > 0 ? "bad" : "good",
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
    id: "available", title: "tileServers",
    read: ({ fleet }) => {
      const sick = Object.entries(fleet.states).filter(([state]) => state !== "up");
      return {
        value: `${count(fleet.available)} / ${count(fleet.servers)}`,
        sub: sick.length === 0
          ? t("subAllUp")
          : sick.map(([state, n]) => `${n} ${t(`state_${state}`)}`).join(", "),
        mood: fleet.available < fleet.servers ? "bad" : "good",
      };
    },
  },
];

export class Tiles {
  constructor() {
    this.tiles = TILES.map((spec) => {
      const title = make("h3");
      const value = make("span", { class: "value" }, NONE);
      const unit = make("span", { class: "unit" });
      const sub = make("p", { class: "sub" }, "\u00a0");
      const root = make("div", { class: "tile", "data-tile": spec.id }, title,
        make("p", { class: "figure" }, value, unit), sub);
      let spark = null;
      if (spec.figure) {
        const canvas = make("canvas", { class: "spark", "aria-hidden": "true" });
        root.append(canvas);
        spark = new Spark(canvas, { ceiling: spec.ceiling });
      }
      byId("tiles").append(root);
      return {
        spec, spark, title: textOf(title), unit: textOf(unit), value: textOf(value),
        sub: textOf(sub), mood: attributeOf(root, "data-mood"),
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
      tile.mood(mood ?? null);
    }
  }

  draw(history) {
    for (const { spec, spark } of this.tiles) spark?.draw(history.recent(spec.figure));
  }

  remeasure() {
    for (const { spark } of this.tiles) spark?.remeasure();
  }
}
