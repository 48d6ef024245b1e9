// One sample of the server → the six figures that are shown, aggregated over chips.
import { gib, share } from "./format.js";
import { reasonText, text } from "./texts.js";

export const KEYS = ["cpu", "ram", "disk", "hbm", "duty", "tensorcore"];

// Mid-tones: readable as text-free fills and lines on light and on dark.
export const COLOURS = {
  cpu: "#3b8fe0",
  ram: "#2fa36b",
  disk: "#b98a2f",
  hbm: "#9a6be0",
  duty: "#1a9fb0",
  tensorcore: "#d4608f",
};

/** What of `chip` is meant by `key`, in percent, or null. */
export function chipPercent(chip, key) {
  if (key === "hbm") return share(chip.hbm_used, chip.hbm_total);
  return key === "duty" ? chip.duty_cycle : chip.tensorcore_utilization;
}

/** The disk at `path`, else the one with the longest mount point that holds it, else the first. */
export function chosenDisk(disks, path) {
  return disks.find((disk) => disk.path === path) ?? disks.find((disk) => disk.path === "/") ?? disks[0];
}

/** key → {percent: 0..100 or null, detail: what a tooltip says}. */
export function figures(sample, diskPath) {
  const disk = chosenDisk(sample.disks, diskPath);
  const found = {
    diskPath: disk?.path ?? "",
    cpu: { percent: sample.cpu, detail: "" },
    ram: space(sample.ram),
    disk: disk ? space(disk) : missing(sample, "disk"),
    hbm: hbm(sample),
    duty: mean(sample, "duty", "duty_cycle"),
    tensorcore: mean(sample, "tensorcore", "tensorcore_utilization"),
  };
  if (sample.chips_age > 0) {
    for (const key of ["hbm", "duty", "tensorcore"]) {
      found[key].stale = true;
      found[key].detail = [found[key].detail, text("stale", sample.chips_age)].filter(Boolean).join(" · ");
    }
  }
  return found;
}

function space({ used, total }) {
  return { percent: share(used, total), detail: text("ofTotal", gib(used), gib(total)) };
}

function missing(sample, ...keys) {
  const reason = keys.map((key) => sample.unavailable[key]).find(Boolean);
  return { percent: null, detail: [text("notAvailable"), reasonText(reason)].filter(Boolean).join(": ") };
}

function hbm(sample) {
  const known = sample.chips.filter((chip) => chipPercent(chip, "hbm") !== null);
  if (!known.length) return missing(sample, "hbm", "chips");
  const sum = (name) => known.reduce((total, chip) => total + chip[name], 0);
  const [used, total] = [sum("hbm_used"), sum("hbm_total")];
  const figure = space({ used, total });
  if (known.length > 1) {
    const top = highest(known, "hbm");
    figure.detail = text("onChips", figure.detail, Math.round(chipPercent(top, "hbm")), top.index);
  }
  return figure;
}

function mean(sample, key, name) {
  const known = sample.chips.filter((chip) => chip[name] !== null);
  if (!known.length) return missing(sample, name, "chips");
  const value = known.reduce((total, chip) => total + chip[name], 0) / known.length;
  const top = highest(known, key);
  const several = text("meanOfChips", known.length, Math.round(top[name]), top.index);
  return { percent: value, detail: known.length > 1 ? several : "" };
}

function highest(chips, key) {
  return chips.reduce((top, chip) => (chipPercent(chip, key) > chipPercent(top, key) ? chip : top));
}
