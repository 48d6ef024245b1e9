// TPU Monitor: a strip in the top bar and a sidebar tab, fed by the server's samples. This file wires the others.
//
// ComfyUI imports every .js in this folder; all but this one only define things.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Feed } from "./feed.js";
import { figures } from "./figures.js";
import { History } from "./history.js";
import { Mount } from "./mount.js";
import { Panel } from "./panel.js";
import { Run } from "./run.js";
import { addDiskSetting, definitions, DISK, RATE, shown, value, WIDTH } from "./settings.js";
import { Strip } from "./strip.js";
import { setLanguage, text } from "./texts.js";

const TAB = "tpuMonitor";

class Monitor {
  constructor() {
    this.history = new History();
    this.run = new Run();
    this.strip = new Strip(() => toggleTab());
    this.panel = new Panel({ onFree: () => this.free(), onResetPeaks: () => this.resetPeaks() });
    this.mount = new Mount(this.strip.element);
    this.feed = new Feed(
      (sample) => this.show(sample),
      () => this.fallSilent(),
    );
    this.run.addEventListener("change", () => this.showRun());
    document.addEventListener("visibilitychange", () => this.showRun());
    this.run.listen();
    this.configure();
    this.mount.ensure();
  }

  configure() {
    this.strip.configure(shown(), value(WIDTH));
    this.strip.updateRun(this.run);
    const rate = value(RATE);
    if (rate !== this.feed.rate) this.feed.setRate(rate);
    if (rate === 0) this.fallSilent();
    else if (this.sample) this.show(this.sample, false);
  }

  show(sample, isNew = true) {
    this.sample = sample;
    this.figures = figures(sample, value(DISK));
    if (isNew) this.history.add(this.figures);
    this.mount.ensure();
    this.strip.update(this.figures);
    this.panel.say("");
    if (this.panel.open) this.panel.update(sample, this.figures, this.history);
  }

  fallSilent() {
    this.sample = null;
    const why = value(RATE) === 0 ? text("off") : text("waiting");
    this.strip.clear(why);
    this.panel.say(why);
    this.mount.ensure();
  }

  showRun() {
    this.strip.updateRun(this.run);
    if (this.panel.open) this.panel.updateRun(this.run);
    clearTimeout(this.ticking);
    if (this.run.running && !document.hidden) this.ticking = setTimeout(() => this.showRun(), 1000);
  }

  openIn(container) {
    container.replaceChildren(this.panel.element);
    if (this.sample) this.panel.update(this.sample, this.figures, this.history);
    this.panel.updateRun(this.run);
  }

  resetPeaks() {
    this.history.resetPeaks();
    if (this.sample) this.panel.update(this.sample, this.figures, this.history);
  }

  async free() {
    const response = await post("/free", { unload_models: true });
    const freed = this.run.running ? text("freedLater") : text("freed");
    app.extensionManager.toast.add({
      severity: response.ok ? "success" : "error",
      summary: text("freeHbm"),
      detail: response.ok ? freed : text("notFreed", response.status),
      life: 4000,
    });
  }
}

function toggleTab() {
  app.extensionManager.command.execute(`Workspace.ToggleSidebarTab.${TAB}`);
}

/** The server's answer; one that says what went wrong if none came. */
async function post(route, body) {
  const headers = { "Content-Type": "application/json" };
  return api
    .fetchApi(route, { method: "POST", headers, body: JSON.stringify(body) })
    .catch((error) => ({ ok: false, status: error.message }));
}

async function disks() {
  try {
    const response = await api.fetchApi("/tpu-monitor/sample");
    return response.ok ? (await response.json()).disks : [];
  } catch {
    return [];
  }
}

function addStyles() {
  const link = document.createElement("link");
  link.rel = "stylesheet";
  link.href = new URL("./monitor.css", import.meta.url).href;
  document.head.append(link);
}

let monitor = null;
const configure = () => monitor?.configure();

app.registerExtension({
  name: "ComfyUI-TPU.Monitor",
  settings: definitions(configure),
  async setup() {
    setLanguage(app.extensionManager.setting.get("Comfy.Locale") ?? navigator.language);
    addStyles();
    monitor = new Monitor();
    app.extensionManager.registerSidebarTab({
      id: TAB,
      icon: "pi pi-microchip",
      title: text("title"),
      tooltip: text("title"),
      type: "custom",
      render: (container) => monitor.openIn(container),
    });
    addDiskSetting(await disks(), configure);
  },
});
