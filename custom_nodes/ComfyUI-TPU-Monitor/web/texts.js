// The monitor's own words, in English and Chinese. Settings are translated in locales/, as ComfyUI does it.
export const TEXTS = {
  en: {
    title: "TPU Monitor",
    cpu: "CPU",
    ram: "RAM",
    disk: "Disk",
    hbm: "HBM",
    duty: "Duty",
    tensorcore: "TC",
    "cpu.long": "CPU, all cores",
    "ram.long": "RAM",
    "disk.long": "Disk {0}",
    "hbm.long": "HBM",
    "duty.long": "Duty cycle",
    "tensorcore.long": "TensorCore utilisation",
    notAvailable: "not available",
    ofTotal: "{0} of {1} GiB",
    onChips: "{0} · max {1}% (chip {2})",
    meanOfChips: "{0} chips · max {1}% (chip {2})",
    stale: "The figures are {0} s old.",
    open: "Click to open the TPU monitor.",
    chips: "Chips",
    chip: "Chip {0}",
    noChips: "No TPU chips to show",
    peak: "peak {0}",
    resetPeaks: "Reset peaks",
    freeHbm: "Free HBM",
    freeHbmHint: "Unloads all models, as ComfyUI's own button does. What a running prompt uses is freed after it.",
    freed: "All models are being unloaded.",
    freedLater: "All models will be unloaded when the running prompt has ended.",
    notFreed: "The server did not accept it: {0}",
    held: "Held by ComfyUI on the TPU",
    heldNothing: "Nothing",
    off: "Sampling is off (setting “Seconds between samples”).",
    waiting: "Waiting for the first sample…",
    success: "done",
    error: "failed",
    interrupted: "interrupted",
    "reason.no-tpu-info": "The Python package tpu-info is missing: pip install 'tpu-info>=0.14,<0.15'.",
    "reason.no-chip": "This machine has no TPU chip.",
    "reason.not-running": "The TPU runtime does not answer. It starts when the first model runs on the TPU.",
    "reason.not-reported": "The TPU runtime does not report it.",
    "reason.late": "The TPU runtime answers too late.",
  },
  zh: {
    title: "TPU 监视器",
    cpu: "CPU",
    ram: "内存",
    disk: "磁盘",
    hbm: "HBM",
    duty: "占空比",
    tensorcore: "TC",
    "cpu.long": "CPU（全部核心）",
    "ram.long": "内存",
    "disk.long": "磁盘 {0}",
    "hbm.long": "HBM 显存",
    "duty.long": "占空比",
    "tensorcore.long": "TensorCore 利用率",
    notAvailable: "不可用",
    ofTotal: "{0} / {1} GiB",
    onChips: "{0} · 最高 {1}%（芯片 {2}）",
    meanOfChips: "{0} 个芯片 · 最高 {1}%（芯片 {2}）",
    stale: "数据是 {0} 秒前的。",
    open: "点击打开 TPU 监视器。",
    chips: "芯片",
    chip: "芯片 {0}",
    noChips: "没有可显示的 TPU 芯片",
    peak: "峰值 {0}",
    resetPeaks: "重置峰值",
    freeHbm: "释放 HBM",
    freeHbmHint: "卸载所有模型，与 ComfyUI 自带的按钮相同。正在运行的任务所用的部分在任务结束后释放。",
    freed: "正在卸载所有模型。",
    freedLater: "当前任务结束后将卸载所有模型。",
    notFreed: "服务器未接受：{0}",
    held: "ComfyUI 在 TPU 上占用",
    heldNothing: "无",
    off: "采样已关闭（设置“采样间隔（秒）”）。",
    waiting: "正在等待第一次采样…",
    success: "完成",
    error: "失败",
    interrupted: "已中断",
    "reason.no-tpu-info": "缺少 Python 包 tpu-info：pip install 'tpu-info>=0.14,<0.15'。",
    "reason.no-chip": "这台机器没有 TPU 芯片。",
    "reason.not-running": "TPU 运行时没有应答。第一个模型在 TPU 上运行时它才启动。",
    "reason.not-reported": "TPU 运行时不提供此数据。",
    "reason.late": "TPU 运行时应答太慢。",
  },
};

let current = TEXTS.en;

export function setLanguage(code) {
  current = String(code).startsWith("zh") ? TEXTS.zh : TEXTS.en;
}

/** The text under `key`, with {0}, {1}, … replaced by `values`. */
export function text(key, ...values) {
  return (current[key] ?? key).replace(/\{(\d)\}/g, (_, index) => values[index]);
}

/** Why something is missing: translated where its code is known, else in the server's words. */
export function reasonText(reason) {
  if (!reason) return "";
  return current[`reason.${reason.code}`] ?? reason.text;
}
