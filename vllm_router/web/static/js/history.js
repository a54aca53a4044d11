// What the charts show: the router's own memory from the hello, continued with the snapshots.

/** By name: how to read the figure from a snapshot. */
const READ = {
  requests_per_s: ({ fleet }) => fleet.requests_per_s,
  errors_per_s: ({ fleet }) => fleet.errors_per_s,
  refused_per_s: ({ fleet }) => fleet.refused_per_s,
  saved_per_s: ({ fleet }) => fleet.saved_per_s,
  chunks_per_s: ({ fleet }) => fleet.chunks_per_s,
  tokens_per_s: ({ fleet }) => fleet.tokens_per_s,
  running: ({ fleet }) => fleet.running,
  waiting: ({ fleet }) => fleet.waiting,
  queued: ({ fleet }) => fleet.queued,
  capacity: ({ fleet }) => fleet.capacity,
  load: ({ fleet }) => fleet.load,
  open_streams: ({ router }) => router.open_streams,
  available: ({ fleet }) => fleet.available,
  ttft_p50: ({ fleet }) => fleet.ttft?.p50,
  ttft_p95: ({ fleet }) => fleet.ttft?.p95,
  ttft_p99: ({ fleet }) => fleet.ttft?.p99,
  duration_p50: ({ fleet }) => fleet.duration?.p50,
  duration_p95: ({ fleet }) => fleet.duration?.p95,
  duration_p99: ({ fleet }) => fleet.duration?.p99,
};
export const FIGURES = Object.keys(READ);
const FINE = 300;
const COARSE_STEP = 10;
const COARSE = 360;
/** Two rows further apart than so many intervals have a gap between them. */
const GAP = 3.5;

/** Put a row without values into each gap of columns, times first, so that no line crosses it. */
function withGaps(columns, interval) {
  const [times] = columns;
  const wide = (index) => index > 0 && times[index] - times[index - 1] > interval * GAP;
  if (!times.some((_, index) => wide(index))) return columns;
  return columns.map((column) => column.flatMap((value, index) => {
    if (!wide(index)) return [value];
    return [column === times ? times[index - 1] + interval : null, value];
  }));
}

const rowOf = (snapshot) => FIGURES.map((name) => READ[name](snapshot) ?? null);

/** Means, as the router thins its own; the greatest of a high percentile. */
function thin(rows) {
  return FIGURES.map((name, column) => {
    const values = rows.map((row) => row[column]).filter((value) => value !== null);
    if (values.length === 0) return null;
    if (/_p9[59]$/.test(name)) return Math.max(...values);
    return values.reduce((sum, value) => sum + value, 0) / values.length;
  });
}

/** What a snapshot says of one server, for its charts. */
export const SERVER_FIGURES = ["load", "running", "waiting", "requests_per_s", "errors_per_s", "tokens_per_s", "kv_usage", "ttft_p95"];
const serverRow = (server) => [
  server.load, server.running, server.waiting, server.requests_per_s, server.errors_per_s,
  server.tokens_per_s, server.kv_usage, server.ttft?.p95 ?? null,
];

class Series {
  constructor(length) {
    this.length = length;
    this.times = [];
    this.rows = [];
  }

  add(time, row) {
    this.times.push(time);
    this.rows.push(row);
    if (this.times.length > this.length) {
      this.times.shift();
      this.rows.shift();
    }
  }

  /** Move all rows in time. */
  shift(seconds) {
    this.times = this.times.map((time) => time + seconds);
  }

  /** Take a history in; what is older here than it (of a router before its restart) stays. */
  load(history) {
    const count = history.fleet.load?.length ?? 0;
    const first = history.end - (count - 1) * history.interval;
    const older = this.times.findIndex((time) => time >= first - history.interval / 2);
    const keep = count === 0 || older === -1 ? this.times.length : older;
    this.times.length = this.rows.length = keep;
    for (let index = 0; index < count; index += 1) {
      this.add(
        first + index * history.interval,
        FIGURES.map((name) => history.fleet[name]?.[index] ?? null),
      );
    }
  }
}

export class History {
  constructor() {
    this.fine = new Series(FINE);
    this.coarse = new Series(COARSE);
    this.pending = [];
    this.loads = new Map();
    this.servers = new Map();
    this.newest = 0;
    /** Seconds between two rows; more than one where snapshots come less often. */
    this.interval = 1;
  }

  hello(message) {
    this.interval = Math.max(1, message.config?.feed_interval ?? 1);
    this.fine.load(message.history);
    this.coarse.load(message.hour);
    this.pending = [];
    this.loads = new Map(Object.entries(message.history.servers));
  }

  /** Whether the snapshot made a new row: one a second, however often they come. */
  snapshot(message) {
    this.setBack(message.time);
    const last = this.fine.times.at(-1) ?? 0;
    if (message.time - last < 0.95) return false;
    const row = rowOf(message);
    this.fine.add(message.time, row);
    this.pending.push(row);
    if (this.pending.length >= COARSE_STEP) {
      this.coarse.add(message.time, thin(this.pending));
      this.pending = [];
    }
    const present = new Map();
    const details = new Map();
    for (const server of message.servers) {
      const series = this.servers.get(server.name) ?? new Series(FINE);
      series.add(message.time, serverRow(server));
      details.set(server.name, series);
      const values = this.loads.get(server.name) ?? [];
      values.push(server.load);
      if (values.length > FINE) values.shift();
      present.set(server.name, values);
    }
    this.loads = present;
    this.servers = details;
    return true;
  }

  /**
   * The router's clock may be set back: what is known moves along, as it does in the next hello. Else
   * no row would be newer than the last one until the clock is where it was.
   */
  setBack(time) {
    const last = this.fine.times.at(-1) ?? 0;
    if (time < this.newest - 1 && time < last) {
      for (const series of [this.fine, this.coarse, ...this.servers.values()]) series.shift(time - 1 - last);
    }
    this.newest = time;
  }

  /**
   * Columns of one server since the page was opened, at most five minutes: times, then figures. Its
   * load is known from before, as the hello has it.
   */
  ofServer(name, names) {
    const { times, rows } = this.servers.get(name) ?? { times: [], rows: [] };
    const picked = names.map((figure) => SERVER_FIGURES.indexOf(figure));
    const columns = picked.map((column) => rows.map((row) => row[column]));
    if (!names.includes("load")) return withGaps([[...times], ...columns], this.interval);
    const loads = this.loads.get(name) ?? [];
    const before = loads.slice(0, Math.max(0, loads.length - times.length));
    const first = times[0] ?? this.fine.times.at(-1) ?? 0;
    return withGaps([
      [...before.map((_, index) => first - (before.length - index)), ...times],
      ...columns.map((values, index) => [...before.map((load) => (names[index] === "load" ? load : null)), ...values]),
    ], this.interval);
  }

  /** One figure of the last five minutes. */
  recent(name) {
    const column = FIGURES.indexOf(name);
    return this.fine.rows.map((row) => row[column]);
  }

  /** Columns for a chart of the last `seconds`: times, then the named figures. */
  columns(seconds, names) {
    const end = this.fine.times.at(-1) ?? Date.now() / 1000;
    const start = end - seconds;
    const picked = names.map((name) => FIGURES.indexOf(name));
    const columns = [[], ...names.map(() => [])];
    const put = (time, row, interval) => {
      const before = columns[0].at(-1);
      if (before !== undefined && time - before > interval * GAP) {
        columns[0].push(before + interval);
        for (let index = 1; index < columns.length; index += 1) columns[index].push(null);
      }
      columns[0].push(time);
      picked.forEach((column, index) => columns[index + 1].push(row[column]));
    };
    const fineStart = this.fine.times[0] ?? end;
    this.coarse.times.forEach((time, index) => {
      if (time >= start && time < fineStart) put(time, this.coarse.rows[index], COARSE_STEP * this.interval);
    });
    this.fine.times.forEach((time, index) => {
      if (time >= start) {
        const first = columns[0].length > 0 && columns[0].at(-1) < fineStart;
        put(time, this.fine.rows[index], (first ? COARSE_STEP : 1) * this.interval);
      }
    });
    return { columns, start, end };
  }
}
