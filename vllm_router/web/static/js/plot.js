// One chart with axes: uPlot with the page's colours, a cursor shared by all, and zoom by dragging.

import { clock } from "./format.js";
import { colours } from "./spark.js";

const SECONDS = [1, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600];
/** Less than this is a click, in pixels. */
const LEAST_DRAG = 6;
/** Pixels between two labels of the time axis, without and with seconds. */
const MINUTES_SPACE = 44;
const SECONDS_SPACE = 66;

/** The top of an axis: a series that is `loose` is left out while it is far above the others. */
function topOf(plot, spec, scale) {
  const greatest = (loose) => Math.max(0, ...spec.series.flatMap((series, index) => {
    if ((series.scale ?? "y") !== scale || Boolean(series.loose) !== loose) return [];
    const values = plot.data[index + 1] ?? [];
    let top = 0;
    for (const value of values) if (value > top) top = value;
    return [top];
  }));
  const firm = Math.max(spec.least, greatest(false));
  const loose = greatest(true);
  return Math.max(firm, loose <= 2.5 * firm ? loose : 0) * 1.12;
}

/**
 * `onTime(time)` is called with the time at the cursor, null when it leaves; `onZoom(from, to)`
 * with the times between which was dragged, null twice to see all again.
 */
export function makePlot(spec, box, { columns, range, height, onTime, onZoom }) {
  const ink = colours();
  const axis = (scale, format, side) => ({
    scale, side, stroke: ink.ink, font: `11px ${ink.font}`, gap: 4, space: 34,
    size: side === 1 ? 40 : 44, grid: { show: side === 3, stroke: ink.grid, width: 1 },
    ticks: { show: false },
    values: (_, splits) => splits.map((value) => (value === null ? "" : format(value))),
  });
  const axes = [
    {
      stroke: ink.ink, font: `11px ${ink.font}`, size: 24, gap: 4, incrs: SECONDS,
      space: (self, _, from, to) => ((to - from) * MINUTES_SPACE < 60 * self.width ? SECONDS_SPACE : MINUTES_SPACE),
      grid: { show: false }, ticks: { show: false },
      values: (_, splits, __, ___, step) => splits.map((time) => clock(time, step < 60)),
    },
    axis("y", spec.axis, 3),
  ];
  if (spec.right) axes.push(axis("right", spec.right, 1));
  const plot = new uPlot({
    width: box.clientWidth || 300,
    height,
    legend: { show: false },
    padding: [8, spec.right ? 0 : 12, 0, 0],
    cursor: {
      y: false, drag: { setScale: false, x: Boolean(onZoom), y: false, dist: LEAST_DRAG },
      sync: { key: "vllm-router", setSeries: false }, points: { size: 6 },
      bind: { dblclick: () => () => { onZoom?.(null, null); return null; } },
    },
    scales: {
      x: { time: true, range },
      y: { range: (self) => [0, topOf(self, spec, "y")] },
      right: { range: (self) => [0, topOf(self, spec, "right")] },
    },
    axes,
    series: [{}, ...spec.series.map((series) => ({
      scale: series.scale ?? "y", stroke: ink[series.colour], width: series.width ?? 1.5,
      dash: series.dash, fill: series.area && ink[series.area], points: { show: false },
      spanGaps: false,
    }))],
    hooks: {
      setCursor: [(self) => {
        const index = self.cursor.idx ?? null;
        onTime(index, index === null ? null : self.data[0][index]);
      }],
      setSelect: [(self) => {
        const { left, width } = self.select;
        if (!onZoom || width < LEAST_DRAG) return;
        onZoom(self.posToVal(left, "x"), self.posToVal(left + width, "x"));
        self.setSelect({ left: 0, top: 0, width: 0, height: 0 }, false);
      }],
    },
  }, columns, box);
  return plot;
}
