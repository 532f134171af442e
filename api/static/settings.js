// The form of the settings, as fields of a request. What is empty is not sent.

const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "seed"];

export function sampling(form) {
  const inputs = NUMBERS.map((name) => form.elements[name]);
  return Object.fromEntries(
    inputs.filter((input) => input.value !== "").map((input) => [input.name, input.valueAsNumber]),
  );
}

// What the browser itself finds wrong with a number, in words; null when all is well.
export function fault(form) {
  const wrong = NUMBERS.map((name) => form.elements[name]).find((input) => !input.checkValidity());
  return wrong ? `${wrong.labels[0].textContent}: ${wrong.validationMessage}` : null;
}

export function systemPrompt(form) {
  const content = form.elements.system.value.trim();
  return content ? [{ role: "system", content }] : [];
}
