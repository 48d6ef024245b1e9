// Makes ComfyUI show the packs' translations in languages other than English.
//
// Frontend 1.32 merges custom nodes' translations first and loads the language itself afterwards, which overwrites them.
// They are merged again here, before nodes are registered. Newer frontends do this themselves; then it changes nothing.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

function vueI18n() {
  const provides = document.getElementById("vue-app")?.__vue_app__?._context?.provides ?? {};
  const provided = Object.getOwnPropertySymbols(provides).map((symbol) => provides[symbol]);
  return provided.find((value) => value?.global?.mergeLocaleMessage)?.global;
}

app.registerExtension({
  name: "ComfyUI-TPU.Locales",
  async init() {
    const i18n = vueI18n();
    if (!i18n) return;
    const response = await api.fetchApi("/i18n");
    if (!response.ok) return;
    for (const [language, messages] of Object.entries(await response.json())) {
      i18n.mergeLocaleMessage(language, messages);
    }
  },
});
