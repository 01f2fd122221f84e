/**
 * The events of a streamed conversation in the form of a text's, which the page shows.
 */

export class ChatEvents {
  // Characters may be cut between tokens, and offsets count the whole ones.
  #decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  #offset = 0;

  /** The choice of a conversation's event as that of a text's. */
  choice({ delta, finish_reason, logprobs, token_ids }) {
    const tokens = logprobs?.content ?? [];
    return {
      text: delta.content ?? "",
      finish_reason,
      token_ids,
      logprobs: {
        tokens: tokens.map(({ token }) => token),
        token_logprobs: tokens.map(({ logprob }) => logprob),
        top_logprobs: tokens.map((token) => token.top_logprobs),
        text_offset: tokens.map((token) => this.#place(token)),
        exit_layers: tokens.map((token) => token.exit_layer),
        confidences: tokens.map(({ confidence }) => confidence),
        heads: tokens.map(({ heads }) => heads ?? []),
      },
    };
  }

  /** Where a token begins in the answer, in code points. */
  #place({ bytes }) {
    const start = this.#offset;
    // A special token has a name, and no text.
    const own = Uint8Array.from(bytes ?? []);
    for (const _ of this.#decoder.decode(own, { stream: true })) this.#offset += 1;
    return start;
  }
}
