// What the last minutes were like: a few numbers from each answer of /stats, oldest first.

export const SPAN = 120; // answers that are kept, one a second
const CALM = 4; // answers that a rate is over

export class History {
  constructor() {
    this.samples = [];
  }

  // `now` in milliseconds.
  add(stats, now) {
    const tokens = stats.totals.generated_tokens;
    if (tokens < this.samples.at(-1)?.tokens) this.samples = []; // it is another server's total
    const before = this.samples.at(-CALM) ?? this.samples[0] ?? { tokens, now: now - 1 };
    const rate = ((tokens - before.tokens) * 1000) / (now - before.now);
    this.samples.push({ tokens, now, rate, running: stats.running, waiting: stats.waiting });
    if (this.samples.length > SPAN) this.samples.shift();
  }

  series(name) {
    return this.samples.map((each) => each[name]);
  }
}
