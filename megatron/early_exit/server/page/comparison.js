/**
 * Two texts of one prompt, token by token.
 */

/** Finds where two growing transcripts part. */
export class Comparison {
  constructor(first, second) {
    this.first = first.tokens;
    this.second = second.tokens;
    this.numSame = 0;
  }

  /** Looks at what is new; the index of the first difference, or null while there is none. */
  update() {
    const both = Math.min(this.first.length, this.second.length);
    while (this.numSame < both && isSame(this.first[this.numSame], this.second[this.numSame])) {
      this.numSame += 1;
    }
    return this.numSame < both ? this.numSame : null;
  }

  /** As `update`, when both texts are complete: one that ends sooner differs behind its end. */
  finish() {
    const isEqual = this.update() === null && this.first.length === this.second.length;
    return isEqual ? null : this.numSame;
  }
}

// Other tokens may look the same, so ids decide where the server gives them.
function isSame(a, b) {
  return a.id === undefined ? a.token === b.token : a.id === b.id;
}
