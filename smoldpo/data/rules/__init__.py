"""The rules of cleaning: `texts` mends, `sides` and `dialogue` drop, `answers` and `language` warn,
`across` compares rows with each other. `smoldpo.data.cleaning` names, orders and applies them."""
