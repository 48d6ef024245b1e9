// Keeps the strip in the top bar, whichever frontend it is and however often it rebuilds its menu.
import { app } from "../../scripts/app.js";

// From the best place to one that always exists. Each puts the strip somewhere, or returns false.
const PLACES = [
  (strip) => insert(app.menu?.settingsGroup?.element, (group) => group.before(strip)),
  (strip) => insert(document.querySelector(".actionbar-container"), (bar) => bar.prepend(strip)),
  (strip) => insert(document.querySelector(".comfyui-menu-right, .comfyui-menu"), (bar) => bar.append(strip)),
  (strip) => insert(app.ui?.menuContainer, (menu) => menu.append(strip)),
  (strip) => insert(document.body, (body) => body.append(strip)),
];
// The frontend may still be building its menu when the page has loaded; later a better place is rare.
const [EARLY_MS, EARLY_RETRY_MS, RETRY_MS] = [15000, 500, 5000];

function insert(target, put) {
  if (!target?.isConnected) return false;
  put(target);
  return true;
}

export class Mount {
  constructor(strip) {
    this.strip = strip;
    this.place = PLACES.length;
    this.tried = 0;
    this.made = performance.now();
    this.observer = new MutationObserver(() => this.strip.isConnected || this.#attach());
  }

  /** Called with each sample: attach the strip if it was thrown out or hidden, or look for a better place. */
  ensure() {
    const visible = this.strip.isConnected && this.strip.checkVisibility();
    const now = performance.now();
    const wait = now - this.made < EARLY_MS ? EARLY_RETRY_MS : RETRY_MS;
    if (visible && (this.place === 0 || now - this.tried < wait)) return;
    this.#attach();
  }

  #attach() {
    this.tried = performance.now();
    this.place = PLACES.findIndex((put, index) => {
      this.strip.classList.toggle("tpu-monitor-floating", index === PLACES.length - 1);
      return put(this.strip) && this.strip.checkVisibility();
    });
    this.#watch();
  }

  // Only the lists of children on the way up: watching whole subtrees would run with every change of the page.
  #watch() {
    this.observer.disconnect();
    for (let node = this.strip.parentElement; node; node = node.parentElement) {
      this.observer.observe(node, { childList: true });
    }
  }
}
