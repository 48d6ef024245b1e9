// The monitor's settings: stable ids, names in locales/*/settings.json.
import { app } from "../../scripts/app.js";
import { KEYS } from "./figures.js";

const GROUP = "TPU Monitor";
export const RATE = "TPUMonitor.Rate";
export const WIDTH = "TPUMonitor.Width";
export const DISK = "TPUMonitor.Disk";
export const SHOW = {
  cpu: "TPUMonitor.Show.CPU",
  ram: "TPUMonitor.Show.RAM",
  disk: "TPUMonitor.Show.Disk",
  hbm: "TPUMonitor.Show.HBM",
  duty: "TPUMonitor.Show.DutyCycle",
  tensorcore: "TPUMonitor.Show.TensorCore",
  run: "TPUMonitor.Show.Progress",
};
const NAMES = {
  cpu: "Show CPU",
  ram: "Show RAM",
  disk: "Show disk",
  hbm: "Show HBM",
  duty: "Show duty cycle",
  tensorcore: "Show TensorCore utilisation",
  run: "Show progress and elapsed time",
};
const DEFAULTS = { [RATE]: 1, [WIDTH]: 70, [DISK]: "/" };
for (const id of Object.values(SHOW)) DEFAULTS[id] = true;

// Frontend 1.32 tells of a change before it has stored it.
const told = new Map();

function teller(id, onChange) {
  return (value) => {
    told.set(id, value);
    onChange();
  };
}

/** What registerExtension takes. `onChange()` comes after any of them has changed. */
export function definitions(onChange) {
  const show = [...KEYS, "run"].map((key) => ({
    id: SHOW[key],
    name: NAMES[key],
    type: "boolean",
    category: [GROUP, "Strip", SHOW[key]],
  }));
  const others = [
    {
      id: RATE,
      name: "Seconds between samples (0: off)",
      type: "slider",
      attrs: { min: 0, max: 5, step: 0.25 },
      category: [GROUP, "Sampling", RATE],
    },
    {
      id: WIDTH,
      name: "Width of an item in pixels",
      type: "slider",
      attrs: { min: 44, max: 140, step: 2 },
      category: [GROUP, "Strip", WIDTH],
    },
  ];
  return [...show, ...others].map((each, index) => ({
    ...each,
    // The dialog shows higher ones first.
    sortOrder: 100 - index,
    defaultValue: DEFAULTS[each.id],
    onChange: teller(each.id, onChange),
  }));
}

/** The disk setting: its choices are known only when the server has told them. */
export function addDiskSetting(disks, onChange) {
  app.ui.settings.addSetting({
    id: DISK,
    name: "Disk",
    type: "combo",
    options: [...new Set([...disks.map((disk) => disk.path), value(DISK)])],
    defaultValue: DEFAULTS[DISK],
    category: [GROUP, "Sampling", DISK],
    onChange: teller(DISK, onChange),
  });
}

export function value(id) {
  return told.get(id) ?? app.extensionManager.setting.get(id) ?? DEFAULTS[id];
}

/** Which items of the strip are wanted: key → boolean. */
export function shown() {
  return Object.fromEntries(Object.entries(SHOW).map(([key, id]) => [key, Boolean(value(id))]));
}
