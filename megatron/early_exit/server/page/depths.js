/**
 * The layers that a token may leave at, and how each of them looks.
 *
 * A colour follows the order of the exits, so that close ones can be told apart; the gauge under it
 * is as high as the layer is deep, so that nobody needs to see colours.
 */

import { make } from "./elements.js";

export class Depths {
  /** @param {object} model as the server describes it */
  constructor({ exit_layers: exits, num_layers: numLayers, draft_methods: methods }) {
    this.numLayers = numLayers;
    // No layer runs for what a look-ahead head drafts.
    this.layers = [...(methods.includes("mtp") ? [0] : []), ...exits, numLayers];
  }

  /** Gives an element the colour and gauge of a layer. */
  paint(element, layer) {
    const last = this.layers.length - 1;
    const rank = last === 0 ? 1 : this.layers.indexOf(layer) / last;
    element.style.setProperty("--rank", `${(100 * rank).toFixed(1)}%`);
    element.style.setProperty("--depth", (layer / this.numLayers).toFixed(3));
    return element;
  }

  name(layer) {
    return layer === this.numLayers ? `all ${layer} layers` : this.source(layer);
  }

  /** Where a token comes from, in few words. */
  source(layer) {
    return layer === 0 ? "look-ahead head" : `layer ${layer}`;
  }

  /** Fills a list with one entry a layer. */
  showLegend(list) {
    list.replaceChildren(
      ...this.layers.map((layer) => {
        const swatch = this.paint(make("span", { className: "swatch" }), layer);
        return make("li", {}, swatch, this.name(layer));
      }),
    );
  }
}
