// Numbers as people read them.

/** Bytes → GiB, e.g. "23.1", "178". */
export function gib(bytes) {
  const value = bytes / 2 ** 30;
  return value >= 99.95 ? value.toFixed(0) : value.toFixed(1);
}

/** 0 to 100 or null → "47%" or "–". */
export function percent(value) {
  return value === null ? "–" : `${Math.round(value)}%`;
}

/** Seconds → "0:41", "1:02:03". */
export function clock(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const two = (number) => String(number).padStart(2, "0");
  const [hours, minutes] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60];
  return hours ? `${hours}:${two(minutes)}:${two(whole % 60)}` : `${minutes}:${two(whole % 60)}`;
}

/** Used and total bytes → percent, or null. */
export function share(used, total) {
  return used === null || !total ? null : (100 * used) / total;
}
