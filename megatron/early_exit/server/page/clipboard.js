/**
 * Copying, also where the page came over plain HTTP from another machine: browsers give the
 * clipboard's own interface to secure pages only.
 */

import { make } from "./elements.js";

/** Copies a text; says whether it could. */
export async function copy(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(
      () => true,
      () => false,
    );
  }
  const focused = document.activeElement;
  const field = make("textarea", { value: text, className: "unseen" });
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return done;
}
