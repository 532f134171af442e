// The API key: in this tab's session storage, and nowhere else.

const NAME = "api-key";

export const apiKey = () => sessionStorage.getItem(NAME) ?? "";

export function startKey(input, onChange) {
  input.value = apiKey();
  input.addEventListener("change", () => {
    sessionStorage.setItem(NAME, input.value.trim());
    onChange();
  });
}
